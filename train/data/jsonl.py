"""JSON lines, plain or compressed: one object a line, one field of it the text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from flashcp.train.data.files import find_files, open_binary

__all__ = ["JsonlSource"]

COMPRESSIONS = ("", ".gz", ".bz2", ".xz", ".zst")
SUFFIXES = tuple(stem + end for stem in (".jsonl", ".ndjson", ".json") for end in COMPRESSIONS)


class JsonlSource:
    """Files of JSON lines; blank lines are no records. A bad line raises ValueError naming file:line."""

    def __init__(self, path: str, text_field: str) -> None:
        self._files = find_files(path, SUFFIXES)
        self._text_field = text_field
        self.parts = [str(file) for file in self._files]

    def read(self, part: int, skip: int) -> Iterator[str]:
        file = self._files[part]
        for number, line in _lines(file):
            if not line.strip():
                continue
            if skip:
                skip -= 1
            else:
                yield self._text(line, f"{file}:{number}")

    def _text(self, line: bytes, place: str) -> str:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: JSON or UTF-8
            raise ValueError(f"{place}: not a line of JSON ({error})") from error
        if isinstance(record, dict) and not isinstance(record.get(self._text_field, ""), str):
            value = json.dumps(record[self._text_field])
            raise ValueError(f"{place}: data.text_field={self._text_field!r} holds {value[:40]}: expected text")
        if not isinstance(record, dict) or not isinstance(record.get(self._text_field), str):
            found = ", ".join(record) if isinstance(record, dict) else f"a {type(record).__name__}"
            raise ValueError(f"{place}: no text in data.text_field={self._text_field!r}; it has: {found or 'nothing'}")
        return record[self._text_field]


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with open_binary(file) as lines:
            for number, line in enumerate(lines, start=1):
                yield number, line
    except ValueError:
        raise
    except Exception as error:  # every decompressor has its own
        raise ValueError(f"{file}:{number + 1}: cannot be read ({error})") from error
