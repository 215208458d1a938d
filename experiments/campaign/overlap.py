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
    "2_ranks_64k_8_heads": "--ranks 2 --tokens 65536 --heads 8 --head_dim 128",
    "4_ranks_64k_8_heads": "--ranks 4 --tokens 65536 --heads 8 --head_dim 128",
    "2_ranks_128k_32_heads": "--ranks 2 --tokens 131072 --heads 32 --head_dim 128",
}
SMALL = {"tiny": "--ranks 2 --tokens 512 --heads 2 --head_dim 32"}


def cases(small: bool) -> list[Case]:
    """Two sizes and two numbers of ranks."""
    return [Case(label, 12, 60) for label in (SMALL if small else SIZES)]


def measure(label: str, turn: Turn) -> Iterator[Number | Failure]:
    """The benchmark's rows, in its own words."""
    out = turn.folder / label
    with redirect_stdout(sys.stderr):
        bench_virtual.main([*(SMALL | SIZES)[label].split(), "--out", str(out)])
    for row in read_rows(out):
        yield Number(row.provider, row.metric, row.unit, row.p20, row.median, row.p80)
