"""What overlap hides between ranks that are streams of one process (`bench/virtual.py`)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout

from flashcp.experiments.bench import virtual as bench_virtual
from flashcp.experiments.campaign.part import Case, Turn
from flashcp.experiments.sweep.results import Failure, Number, read_rows

__all__ = ["ABOUT", "KIND", "MINUTES", "cases", "measure"]

ABOUT = "what none, staged and fused leave exposed, next to max(compute, transfer)"
MINUTES = 1.5
KIND = "measured"

SIZES = {
    "2_ranks_64k_8_heads": (2, 65_536, 8, 128),
    "4_ranks_64k_8_heads": (4, 65_536, 8, 128),
    "2_ranks_128k_32_heads": (2, 131_072, 32, 128),
}
"""Ranks, tokens, heads, head_dim."""
SMALL = {"tiny": (2, 512, 2, 32)}


def cases(small: bool) -> list[Case]:
    """Two sizes and two numbers of ranks."""
    return [Case(label, 12, 60) for label in (SMALL if small else SIZES)]


def measure(label: str, turn: Turn) -> Iterator[Number | Failure]:
    """The benchmark's rows, in its own words."""
    ranks, tokens, heads, head_dim = (SMALL | SIZES)[label]
    words = {"ranks": ranks, "tokens": tokens, "heads": heads, "head_dim": head_dim, "out": turn.folder / label}
    with redirect_stdout(sys.stderr):
        bench_virtual.main([word for name, value in words.items() for word in (f"--{name}", str(value))])
    for row in read_rows(turn.folder / label):
        yield Number(row.provider, row.metric, row.unit, row.p20, row.median, row.p80)
