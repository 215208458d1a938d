"""Where documents come from: one registry of sources, each a list of parts that are read record by record."""

from __future__ import annotations

import bz2
import glob
import gzip
import importlib
import io
import itertools
import json
import lzma
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Protocol

from flashcp.files import MIB, check_regular, read_path
from flashcp.limits import Count, Natural, one_of
from flashcp.sharding.lengths import LENGTH_DATA
from flashcp.sharding.packing import OVERFLOWS
from flashcp.sharding.values import cut, first_line, shown

BATCH_ROWS = 256  # of a Parquet file
JSON_NAMES = tuple(stem + end for stem in (".jsonl", ".ndjson", ".json") for end in ("", ".gz", ".bz2", ".xz", ".zst"))
ON_BAD_RECORD = ("stop", "skip")
NOT_STDLIB = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})


BadRecord = Callable[[ValueError], None]
"""Is told of a record that holds no text or too much; reading goes on after it where this returns."""


def stop(error: ValueError) -> None:
    """The first bad record ends the reading."""
    raise error


@dataclass
class DataConfig:
    """What is read, and how it becomes packs, as `conf/data/stdlib.yaml` explains it."""

    source: str = "stdlib"
    path: str = ""
    text_field: str = "text"
    subset: str = ""
    split: str = "train"
    on_bad_record: Annotated[str, one_of(ON_BAD_RECORD)] = "stop"
    record_mib: Count = 64
    tokenizer: str = "bytes"
    end_token: str = ""
    stored_lengths: bool = False
    parse_special: bool = False
    overflow: Annotated[str, one_of(OVERFLOWS)] = "truncate"
    longest: Natural = 0
    epochs: Natural = 0
    prefetch: Count = 4
    plan_workers: Natural = 0

    def check(self) -> None:
        """Raise ValueError for a path that is not read (what `path` holds is found out by opening it)."""
        if self.source == "stdlib" and self.path:
            raise ValueError(
                f"data.path={shown(self.path)}: data=stdlib reads Python's own files and takes no path; expected "
                f"another data, one of {', '.join(name for name in SOURCES if name != 'stdlib')}"
            )


class Source(Protocol):
    """Documents in a fixed order. A record's place is (part, number in that part): reading resumes there."""

    parts: list[str]

    def read(self, part: int, skip: int, bad: BadRecord = stop) -> Iterator[str]:
        """Texts of one part in order, without the first `skip` records. Raises ValueError for what it cannot read, bad
        records left to `bad`, and for a part that `changed`."""
        ...

    def changed(self, part: int) -> str:
        """How a part differs from what it was when it was first read, or first asked about; empty where it does not."""
        ...


def find_files(path: str, suffixes: Sequence[str] = ("",)) -> list[Path]:
    """Files that `data.path` names, sorted: a file, a glob, or every file below a directory.

    Below a directory hidden files are left out and names must end in one of the suffixes; a file or a glob is
    taken at its word. Raises ValueError when there is nothing.
    """
    if not path:
        raise ValueError("data.path is empty: expected a file, a directory or a glob")
    place = read_path(path, "data.path")
    if place.is_file():
        return [place]
    if place.is_dir():
        below = (file for file in place.rglob("*") if file.name.endswith(tuple(suffixes)))
        found = (f for f in below if not any(part.startswith(".") for part in f.relative_to(place).parts))
        wanted = f" with a name in {', '.join(f'*{suffix}' for suffix in suffixes)}" if any(suffixes) else ""
        missing = f"data.path={shown(path)}: no file{wanted} in this directory"
    else:
        found = (Path(match) for match in glob.glob(str(place), recursive=True))
        missing = f"data.path={shown(path)}: no such file or directory, and no file matches it as a glob"
        if place.exists():
            check_regular(place, f"data.path={shown(path)}")  # a pipe, a device
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise ValueError(missing)
    return files


def open_binary(file: Path) -> Any:
    """The bytes of a file, decompressed by its suffix: .gz, .bz2, .xz, .zst or none.

    Raises ValueError when .zst cannot be read for want of a package, and whatever the decompressor raises.
    """
    if file.suffix == ".zst":
        return io.BufferedReader(needed("zstandard", f"{file}: .zst").open(file, "rb"))
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(file.suffix, open)(file, "rb")


def needed(package: str, by: str, install: str = "") -> Any:
    """A package that is optional. Raises ValueError where it is not installed, saying how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise ValueError(f"{by} needs the package {name}: pip install {install or name}") from error


Records = Callable[[Path, int, BadRecord], Iterator[str]]


class Files:
    """Files, each a part. records: the texts of a file in order, without so many of the first."""

    def __init__(self, files: Sequence[Path], records: Records) -> None:
        self._files, self._records = files, records
        self._stamps: dict[int, tuple[int, int]] = {}
        self.parts = [str(file) for file in files]

    def read(self, part: int, skip: int, bad: BadRecord = stop) -> Iterator[str]:
        self._check(part)
        yield from self._records(self._files[part], skip, bad)
        self._check(part)

    def changed(self, part: int) -> str:
        """By size and time alone, which cost nothing. A file that is gone was not changed: who reads it will say so."""
        try:
            found = self._files[part].stat()
        except OSError:
            return ""
        stamp = (found.st_size, found.st_mtime_ns)
        same = self._stamps.setdefault(part, stamp) == stamp
        return "" if same else f"{self.parts[part]}: written to since this run read it; expected it to stay as it is"

    def _check(self, part: int) -> None:
        if said := self.changed(part):
            raise ValueError(said)


def whole_text(most_mib: int, file: Path, skip: int, bad: BadRecord) -> Iterator[str]:
    """A document a file, as its bytes are. It is bad, and named, when it is not UTF-8 or of more than so many MiB.
    Raises ValueError when it cannot be read."""
    if skip:
        return
    try:
        with file.open("rb") as opened:
            content = opened.read(most_mib * MIB + 1)
        if len(content) > most_mib * MIB:
            bad(ValueError(f"{file}: more than data.record_mib={most_mib} MiB"))
            return
        text = content.decode()  # not read as text, which would turn \r\n into \n
    except UnicodeDecodeError as error:
        bad(ValueError(f"{file}: not UTF-8 text (byte {error.start}); name the files to read with a glob in data.path"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
    else:
        yield text


@cache  # a sweep opens the source for each of its runs
def stdlib_files() -> list[Path]:
    """The Python standard library's own source files, sorted by path: text that exists on every machine."""
    files = []
    for folder, below, names in os.walk(sysconfig.get_paths()["stdlib"]):
        below[:] = [name for name in below if name not in NOT_STDLIB]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)


def json_lines(text_field: str, most_mib: int, file: Path, skip: int, bad: BadRecord) -> Iterator[str]:
    """An object a line, one field of it the text; blank lines are no records. A bad line is named by file:line, one of
    more than so many MiB among them."""
    number = 0
    try:
        with open_binary(file) as lines:
            for number, line in enumerate(iter(partial(lines.readline, most_mib * MIB + 1), b""), start=1):
                is_whole = len(line) <= most_mib * MIB
                if is_whole and not line.strip():
                    continue
                place, text = f"{file}:{number}", None
                if skip:
                    skip -= 1
                else:
                    try:
                        if not is_whole:
                            raise ValueError(f"{place}: a line of more than data.record_mib={most_mib} MiB")
                        text = _text_of(line, text_field, place)
                    except ValueError as error:
                        bad(error)
                while not is_whole and not line.endswith(b"\n") and line:  # to its end
                    line = lines.readline(MIB)
                if text is not None:
                    yield text
    except ValueError:
        raise
    except Exception as error:  # every decompressor has its own
        raise ValueError(f"{file}:{number + 1}: cannot be read ({error})") from error


def _text_of(line: bytes, text_field: str, place: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: JSON or UTF-8
        raise ValueError(f"{place}: not a line of JSON ({error})") from error
    fields = record if isinstance(record, dict) else {}
    text = fields.get(text_field)
    if isinstance(text, str):
        return text
    if text_field in fields:
        raise ValueError(f"{place}: data.text_field={text_field!r} holds {json.dumps(text)[:40]}: expected text")
    found = cut(", ".join(record)) if isinstance(record, dict) else f"a {type(record).__name__}"
    raise ValueError(f"{place}: no text in data.text_field={text_field!r}; it has: {found or 'nothing'}")


def parquet_files(path: str, text_field: str, most_mib: int) -> Files:
    """A row a document, one column the text. Raises ValueError for files or columns that are not."""
    parquet = needed("pyarrow.parquet", "data.source='parquet'", "'flashcp[parquet]'")

    def records(file: Path, skip: int, bad: BadRecord) -> Iterator[str]:
        try:
            with parquet.ParquetFile(file) as table:
                names = table.schema_arrow.names
                if text_field not in names:
                    raise ValueError(f"no column data.text_field={text_field!r}; it has: {cut(', '.join(names))}")
                for group in range(table.num_row_groups):
                    rows = table.metadata.row_group(group).num_rows
                    if skip < rows:  # groups before it are not read
                        batches = table.iter_batches(BATCH_ROWS, row_groups=[group], columns=[text_field])
                        texts = (text for batch in batches for text in batch.column(0).to_pylist())
                        for text in itertools.islice(texts, skip, None):
                            if not isinstance(text, str):
                                bad(ValueError(f"column {text_field!r} holds {text!r}: expected text"))
                            elif len(text) > most_mib * MIB:
                                bad(ValueError(f"a row of more than data.record_mib={most_mib} MiB"))
                            else:
                                yield text
                    skip = max(0, skip - rows)
        except (OSError, ValueError, NotImplementedError, MemoryError) as error:  # what pyarrow's own errors are
            raise ValueError(f"{file}: {first_line(error)}") from error

    return Files(find_files(path, (".parquet",)), records)


class HuggingFaceSource:
    """One split of a data set of the hub by name, streamed; needs the network. Raises ValueError when it cannot be
    loaded or has no such column."""

    def __init__(self, name: str, subset: str, split: str, text_field: str) -> None:
        if not name:
            raise ValueError("data.path is empty: expected the name of a data set on the Hugging Face hub")
        load_dataset = needed("datasets", "data.source='huggingface'").load_dataset
        try:
            self._rows = load_dataset(name, subset or None, split=split, streaming=True)
        except Exception as error:  # whatever the hub, the network or the data set's own files raise
            told = f"data.path={shown(name)}: cannot load it from the Hugging Face hub: {first_line(error)}"
            raise ValueError(told) from error
        self._text_field = text_field
        self.parts = [f"{name}/{subset}/{split}" if subset else f"{name}/{split}"]

    def read(self, part: int, skip: int, bad: BadRecord = stop) -> Iterator[str]:
        for row in self._rows.skip(skip):
            if isinstance(row.get(self._text_field), str):
                yield row[self._text_field]
            else:
                has = ", ".join(row)
                bad(ValueError(f"{self.parts[part]}: no text in data.text_field={self._text_field!r}; it has: {has}"))

    def changed(self, part: int) -> str:
        """The hub does not say."""
        return ""


SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "stdlib": lambda data: Files(stdlib_files(), partial(whole_text, data.record_mib)),
    "text": lambda data: Files(find_files(data.path), partial(whole_text, data.record_mib)),
    "jsonl": lambda data: Files(
        find_files(data.path, JSON_NAMES), partial(json_lines, data.text_field, data.record_mib)
    ),
    "parquet": lambda data: parquet_files(data.path, data.text_field, data.record_mib),
    "huggingface": lambda data: HuggingFaceSource(data.path, data.subset, data.split, data.text_field),
}


def open_source(data: DataConfig) -> Source:
    """The source a config names. Raises ValueError for an unknown name, a missing path or nothing to read.

    Data sets of lengths (`wlb_llm`, `pile`, ...) have no text: they can be planned, not trained on.
    """
    if data.source in (*LENGTH_DATA, "lengths"):
        raise ValueError(
            f"data.source={shown(data.source)} holds document lengths and no text, to plan and simulate with, "
            f"not to train on; expected one of {', '.join(SOURCES)}"
        )
    if data.source not in SOURCES:
        raise ValueError(f"data.source={shown(data.source)}: expected one of {', '.join(SOURCES)}")
    return SOURCES[data.source](data)
