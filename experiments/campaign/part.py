"""What a part of the campaign is: a module with `ABOUT`, `MINUTES`, `cases` and `measure`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import torch

from flashcp.experiments.sweep.results import Failure, Number

__all__ = ["PARTS", "Case", "Part", "Turn", "load"]

PARTS = {
    name: f"flashcp.experiments.campaign.{name}"
    for name in ("correct", "attention", "overlap", "tune", "calibrate", "hybrid")
}
"""Modules by name, the most valuable first."""


class Case(NamedTuple):
    """One thing to measure. expected_s: about how long it takes. limit_s: after so long it counts as hanging."""

    label: str
    expected_s: float
    limit_s: float


@dataclass(frozen=True)
class Turn:
    """How a case is measured. small: to try the code, not to measure. folder: for what is written beside the rows.

    left_out: providers that hung at this case before. seconds: that are left of the part. begin: is told whose turn
    it is, so that a hang is put down to them.
    """

    device: torch.device
    folder: Path
    seconds: float
    small: bool = False
    left_out: frozenset[str] = frozenset()
    begin: Callable[[str], None] = lambda provider: None


class Part(Protocol):
    """ABOUT: what it brings home. MINUTES: its share of a sitting. KIND: as rows say it."""

    ABOUT: str
    MINUTES: float
    KIND: str

    def cases(self, small: bool) -> Sequence[Case]:
        """What there is to measure, the most valuable first."""

    def measure(self, label: str, turn: Turn) -> Iterator[Number | Failure]:
        """Measure the case of that label."""


def load(module: str) -> Part:
    """The part in a module."""
    return cast(Part, import_module(module))
