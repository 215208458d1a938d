"""What a part of the campaign is, and where each is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple, cast

import torch

from flashcp.experiments.sweep.results import Failure, Number

HERE = "flashcp.experiments.campaign"
PARTS = {
    "correct": f"{HERE}.correct:PART",
    "attention": f"{HERE}.attention:PART",
    "overlap": f"{HERE}.machine:OVERLAP",
    "tune": f"{HERE}.tune:PART",
    "calibrate": f"{HERE}.machine:CALIBRATE",
    "hybrid": f"{HERE}.machine:HYBRID",
}
"""Modules and what they call it, by name, the most valuable first."""


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


class Part(NamedTuple):
    """about: what it brings home. minutes: its share of a sitting. cases: what there is to measure, or what there is in
    small, the most valuable first. measure: the case of a label. kind: as rows say it."""

    about: str
    minutes: float
    cases: Callable[[bool], Sequence[Case]]
    measure: Callable[[str, Turn], Iterator[Number | Failure]]
    kind: str = "measured"


def load(place: str) -> Part:
    """The part at `module:NAME`."""
    return cast(Part, resolve_name(place))
