"""Where results go, checked before anything runs; pages out of Jinja2 templates, written whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any


def check_file(file: Path, field: str = "out") -> None:
    """Raise ValueError when the file cannot be written; what it holds stays. field: that names it."""
    check_out(file.parent, field)
    try:
        if file.exists():
            file.open("ab").close()
    except OSError as error:
        raise ValueError(f"{field}={str(file)!r}: cannot be written ({error.strerror})") from error


def check_out(out: Path, field: str = "out") -> None:
    """Raise ValueError when no file can be made in the directory `out`. Found out by making one; nothing stays."""
    made: list[Path] = []
    try:
        made = [folder for folder in (out, *out.absolute().parents) if not folder.exists()]
        place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise ValueError(f"{field}={str(out)!r}: {place} is not a directory that may be written to")
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"{field}={str(out)!r}: cannot be written ({error.strerror})") from error
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def leave_no_trace(files: Iterable[Path], made: Iterable[Path]) -> None:
    """Remove the files, and of the folders that were made for them, innermost first, those that are empty then."""
    for file in files:
        file.unlink(missing_ok=True)
    for folder in made:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def render(template: Path, **values: Any) -> str:
    """The template's text with these values; in HTML they are escaped. A name that nobody gave is an error."""
    import jinja2  # late: a command that writes no page is quicker without

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=template.name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(**values)


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(f"unfinished_{path.name}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
