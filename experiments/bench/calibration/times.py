"""The times of a calibration, measured and predicted: their rows, their file, their errors."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = ["DIRECTIONS", "SPLITS", "Errors", "TimeRow", "errors", "read_times", "write_times"]

DIRECTIONS = ("forward", "backward")
SPLITS = ("fit", "check")


class TimeRow(NamedTuple):
    """One schedule in one direction: what was measured and what the parameters say. split: `fit` or `check`."""

    schedule: int
    split: str
    direction: str
    query_heads: int
    query_rows: int
    pairs: int
    ranges: int
    measured_us: float
    predicted_us: float
    device: str
    versions: str
    commit: str
    date: str


class Errors(NamedTuple):
    """How far predictions are from measurements, as shares of these, over so many schedules."""

    median: float
    p95: float
    schedules: int


def errors(times: Iterable[TimeRow], direction: str, split: str) -> Errors:
    """Of one direction and split."""
    chosen = [row for row in times if (row.direction, row.split) == (direction, split)]
    distance = [abs(row.predicted_us / row.measured_us - 1) for row in chosen]
    return Errors(float(np.median(distance)), float(np.percentile(distance, 95)), len(distance))


def write_times(path: Path, times: Sequence[TimeRow]) -> None:
    """As CSV."""
    with path.open("w", encoding="utf-8", newline="") as lines:
        table = csv.writer(lines, lineterminator="\n")
        table.writerow(TimeRow._fields)
        table.writerows(times)


def read_times(path: Path) -> list[TimeRow]:
    """The rows `write_times` wrote. Raises ValueError for another table."""
    with path.open(encoding="utf-8", newline="") as lines:
        table = csv.DictReader(lines)
        if tuple(table.fieldnames or ()) != TimeRow._fields:
            raise ValueError(f"{path}: expected the columns {', '.join(TimeRow._fields)}")
        kinds = {"schedule": int, "query_heads": int, "query_rows": int, "pairs": int, "ranges": int}
        kinds |= {"measured_us": float, "predicted_us": float}  # type: ignore[dict-item]
        return [TimeRow(**{name: kinds.get(name, str)(value) for name, value in line.items()}) for line in table]  # type: ignore[arg-type]
