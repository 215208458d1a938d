"""Overrides as Hydra's grammar takes them: a value that it cannot parse, or would take a path for more, is text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString, Sweep
from hydra.errors import HydraException

PATHS = frozenset({"path", "out", "figure", "cluster_file", "replay", "resume", "tokenizer"})
"""Last parts of keys whose values may be paths."""
SEVERAL = ("-m", "--multirun", "hydra.mode=", "experiment=")
"""How a word begins that may make several jobs of one line: a comma then separates values."""


def quoted(words: Sequence[str], several: bool = False) -> list[str]:
    """The words, with quotes around what is meant as it stands. several: whether they make several jobs, which some
    words (SEVERAL) say too.

    Of any key what the grammar refuses, such as `a(1).txt`; of a key of PATHS also a number, which would be written
    otherwise, and where there is one job a comma.
    """
    several = several or any(word.startswith(SEVERAL) for word in words)
    return [_quoted(word, several) for word in words]


def _quoted(word: str, several: bool) -> str:
    key, is_override, value = word.partition("=")
    more = () if several or key.rpartition(".")[2] not in PATHS else (Sweep, int, float)
    if not is_override or _parses(word, more):
        return word
    values = value.split(",") if several else [value]
    texts = [
        one if several and _parses(f"{key}={one}") else QuotedString(one, Quote.single).with_quotes() for one in values
    ]
    made = f"{key}={','.join(texts)}"
    return made if _parses(made) else word


def _parses(word: str, but: tuple[type[Any], ...] = ()) -> bool:
    """Whether it is an override, of a value of no type in `but`."""
    try:
        return not isinstance(OverridesParser.create().parse_override(word).value(), but)
    except (HydraException, RecursionError):  # Hydra itself will say what is wrong with the key
        return False
