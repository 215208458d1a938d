"""Where documents come from: one registry of sources, each a list of parts that are read record by record."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Protocol

from flashcp.limits import Count, Natural, one_of
from flashcp.sharding.lengths import LENGTH_DATA
from flashcp.sharding.packing import OVERFLOWS
from flashcp.train.data.files import find_files, read_utf8
from flashcp.train.data.huggingface import HuggingFaceSource
from flashcp.train.data.jsonl import JsonlSource
from flashcp.train.data.parquet import ParquetSource

__all__ = ["SOURCES", "DataConfig", "Source", "StdlibSource", "TextSource", "open_source"]


@dataclass
class DataConfig:
    """What is read, and how it becomes packs.

    source: a name in SOURCES. path: a file, a directory or a glob; for `huggingface` the data set's name.
    text_field: JSON field or table column that holds the text. subset, split: `huggingface` only.
    tokenizer: `bytes`, the path of a tokenizers JSON file, or a name on the Hugging Face hub.
    end_token: vocabulary entry put after every document; empty: none (`bytes` has its own end mark).
    overflow: what becomes of a document's tail that does not fit a window: `truncate` or `carry`.
    longest: documents of more tokens are left out; 0 keeps all.
    epochs: times the documents are read; 0: as often as the steps need.
    prefetch: windows packed and planned ahead of the step.
    """

    source: str = "stdlib"
    path: str = ""
    text_field: str = "text"
    subset: str = ""
    split: str = "train"
    tokenizer: str = "bytes"
    end_token: str = ""
    overflow: Annotated[str, one_of(OVERFLOWS)] = "truncate"
    longest: Natural = 0
    epochs: Natural = 0
    prefetch: Count = 4

    def check(self) -> None:
        """Raise ValueError for a path that is not read (what `path` holds is found out by opening it)."""
        if self.source == "stdlib" and self.path:
            raise ValueError(
                f"data.path={self.path!r}: data=stdlib reads Python's own files and takes no path; expected another "
                f"data, one of {', '.join(name for name in SOURCES if name != 'stdlib')}"
            )


class Source(Protocol):
    """Documents in a fixed order. A record's place is (part, number in that part): reading resumes there."""

    parts: list[str]

    def read(self, part: int, skip: int) -> Iterator[str]:
        """Texts of one part in order, without the first `skip`. Raises ValueError for what it cannot read."""
        ...


class TextSource:
    """Text files, one document each. UTF-8; a file that is not raises ValueError when its turn comes."""

    def __init__(self, path: str) -> None:
        self._files = find_files(path)
        self.parts = [str(file) for file in self._files]

    def read(self, part: int, skip: int) -> Iterator[str]:
        if skip == 0:
            yield read_utf8(self._files[part])


class StdlibSource(TextSource):
    """The Python standard library's own source files, sorted by path: text that exists on every machine."""

    SKIPPED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})

    def __init__(self) -> None:
        self._files = list(self._found())
        self.parts = [str(file) for file in self._files]

    @classmethod
    @cache  # a sweep opens the source for each of its runs
    def _found(cls) -> tuple[Path, ...]:
        files = []
        for folder, below, names in os.walk(sysconfig.get_paths()["stdlib"]):
            below[:] = [name for name in below if name not in cls.SKIPPED]
            files += [Path(folder, name) for name in names if name.endswith(".py")]
        return tuple(sorted(files))


SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "stdlib": lambda data: StdlibSource(),
    "text": lambda data: TextSource(data.path),
    "jsonl": lambda data: JsonlSource(data.path, data.text_field),
    "parquet": lambda data: ParquetSource(data.path, data.text_field),
    "huggingface": lambda data: HuggingFaceSource(data.path, data.subset, data.split, data.text_field),
}


def open_source(data: DataConfig) -> Source:
    """The source a config names. Raises ValueError for an unknown name, a missing path or nothing to read.

    Data sets of lengths (`wlb_llm`, `pile`, ...) have no text: they can be planned, not trained on.
    """
    if data.source in (*LENGTH_DATA, "lengths"):
        raise ValueError(
            f"data.source={data.source!r} holds document lengths and no text, to plan and simulate with, "
            f"not to train on; expected one of {', '.join(SOURCES)}"
        )
    if data.source not in SOURCES:
        raise ValueError(f"data.source={data.source!r}: expected one of {', '.join(SOURCES)}")
    return SOURCES[data.source](data)
