"""`make docs` builds site/ with Sphinx: the repository's own pages at their own places, and the API from docstrings."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import flashcp

project, release = "FlashCP", flashcp.__version__
author = "the FlashCP developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinxcontrib.mermaid"]
myst_fence_as_directive = ["mermaid"]
# The root is the source folder, so that a link between pages serves the repository and the site.
root_doc = "docs/index"
include_patterns = [
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "RELIABILITY.md", "docs/*.md", "experiments/*.md",
    "experiments/results/demo/*.md",
]  # fmt: skip
exclude_patterns = ["docs/conf.py"]
myst_heading_anchors = 4  # as code hosts name them
myst_enable_extensions = ["attrs_inline"]
suppress_warnings = ["myst.header"]  # the log's entries begin at the second level
default_role = "code"  # `name` in a docstring
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
html_theme = "furo"
html_title = f"FlashCP {release}"
html_show_sourcelink = False


def mark_up(app: Any, what: str, name: str, thing: object, options: Any, lines: list[str]) -> None:
    """A paragraph of a docstring whose lines hang is a list of parameters, an item each; an indented one stays as it is
    laid out."""
    written: list[str] = []
    for is_blank, group in groupby(lines, key=lambda line: not line.strip()):
        paragraph = list(group)
        hangs = [line.startswith("    ") for line in paragraph]
        if not is_blank and all(hangs):
            written += ["::", ""]
        elif not is_blank and any(hangs):
            paragraph = [
                "  " + line.strip() if hang else "* " + line for line, hang in zip(paragraph, hangs, strict=True)
            ]
        written += paragraph
    lines[:] = written


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", mark_up)
