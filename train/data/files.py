"""Files by path, directory or glob, opened through their compression; packages that are optional."""

from __future__ import annotations

import bz2
import glob
import gzip
import importlib
import io
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["find_files", "needed", "open_binary", "read_utf8"]


def find_files(path: str, suffixes: Sequence[str] = ("",)) -> list[Path]:
    """Files that `data.path` names, sorted: a file, a glob, or every file below a directory.

    Below a directory hidden files are left out and names must end in one of the suffixes; a file or a glob is
    taken at its word. Raises ValueError when there is nothing.
    """
    if not path:
        raise ValueError("data.path is empty: expected a file, a directory or a glob")
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        below = (file for file in place.rglob("*") if file.name.endswith(tuple(suffixes)))
        shown = (f for f in below if not any(part.startswith(".") for part in f.relative_to(place).parts))
        wanted = f" with a name in {', '.join(f'*{suffix}' for suffix in suffixes)}" if any(suffixes) else ""
        missing = f"data.path={path!r}: no file{wanted} in this directory"
    else:
        shown = (Path(match) for match in glob.glob(str(place), recursive=True))
        missing = f"data.path={path!r}: no such file or directory, and no file matches it as a glob"
    files = sorted(file for file in shown if file.is_file())
    if not files:
        raise ValueError(missing)
    return files


def read_utf8(file: Path) -> str:
    """The text of a file. Raises ValueError naming the file when it cannot be read or is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: not UTF-8 text (byte {error.start}); name the files to read with a glob in data.path"
        ) from error
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error


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
