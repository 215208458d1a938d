"""Pages out of Jinja2 templates."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

__all__ = ["render", "write_whole"]


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
