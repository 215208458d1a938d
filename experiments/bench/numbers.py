"""Numbers and failures of a case as benchmarks yield them, and the rows they become."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import NamedTuple

import torch
import triton

from flashcp import __version__
from flashcp.experiments.provenance import commit
from flashcp.experiments.sweep.rows import FAILED, Row

__all__ = ["Failure", "Number", "check_device", "reason", "to_row", "versions"]

LONGEST = 240  # characters of a reason


class Number(NamedTuple):
    """One number of a case. median: or the number itself, where there is one (p20, p80 None)."""

    provider: str
    metric: str
    unit: str
    p20: float | None
    median: float
    p80: float | None


class Failure(NamedTuple):
    """Somebody did not come through. reason: one line."""

    provider: str
    reason: str


def reason(failure: BaseException) -> str:
    """What an exception says, on one line and not too long, or its name."""
    return (" ".join(str(failure).split()) or type(failure).__name__)[:LONGEST]


def check_device(device: torch.device) -> None:
    """Raise RuntimeError where a GPU takes no more work: every later call of this process would fail as the last."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except Exception as failure:
        raise RuntimeError(f"the GPU takes no more work from this process: {reason(failure)}") from failure


def versions() -> str:
    """Of what decides a kernel's time."""
    return f"flashcp {__version__}, torch {torch.__version__}, triton {triton.__version__}"


def to_row(case: str, found: Number | Failure, device: str, kind: str = "measured", of_commit: str = "") -> Row:
    """With all that a row must carry, today. device: its name. of_commit: where the checkout has no git to ask."""
    carried = (device, versions(), of_commit or commit(), datetime.now(UTC).date().isoformat())
    if isinstance(found, Failure):
        kind = f"{FAILED}: {' '.join(found.reason.split())[:LONGEST]}"
        return Row(case, found.provider, FAILED, "1", None, None, 1.0, None, *carried, kind, "", "")
    return Row(case, found.provider, found.metric, found.unit, None, found.p20, found.median, found.p80, *carried,
               kind, "", "")  # fmt: skip
