"""From measured times to a machine: least squares without negative parameters, predictions beside times, the file.

Imports neither torch nor a kernel: reports read the times as well.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import typing
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flashcp.simulator.cost import (
    BACKWARD_FLOPS,
    FORWARD_FLOPS,
    AttentionCost,
    AttentionShape,
    KernelCost,
    ReadFeatures,
    read_features,
)
from flashcp.simulator.machine import Machine

if TYPE_CHECKING:
    from flashcp.experiments.bench.kernel_times import RankSchedule
    from flashcp.kernels.schedule import Schedule

FREE = 1e6  # GB/s: what a part that the measurements do not show is given
TILES = ((128, 64), (64, 64), (32, 32), (16, 16), (64, 1), (32, 1), (16, 1))
"""Tile shapes that are tried: kernels cut as they like, and the best fit tells."""
DIRECTIONS = ("forward", "backward")
SPLITS = ("fit", "check")


class KernelSample(NamedTuple):
    """One kernel's work: its reads' features, the query rows it holds, its heads, and the time it took."""

    reads: ReadFeatures
    query_rows: int
    shape: AttentionShape
    us: float


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


def fit_attention(
    schedules: Sequence[RankSchedule],
    shapes: Sequence[AttentionShape],
    times: Sequence[Sequence[float]],
    fitting: int,
) -> tuple[AttentionCost, list[list[float]]]:
    """The tile shape and parameters with the least error on the first `fitting` schedules.

    times: forward and backward, us. Returns the cost and its predictions for every schedule, forward and backward.
    """

    def fit(tiles: tuple[int, int]) -> tuple[float, AttentionCost, list[list[float]]]:
        reads = [schedule_features(one.schedule, tiles) for one in schedules]
        rows = [one.query_rows for one in schedules]
        passes = [(bool(way), [*map(KernelSample, reads, rows, shapes, us)]) for way, us in enumerate(times)]
        (there, error), (back, other) = (fit_kernel(each[:fitting], way) for way, each in passes)
        cost = AttentionCost(there, back, *tiles)
        return error + other, cost, [[kernel_us(cost, sample, way) for sample in each] for way, each in passes]

    return min(map(fit, TILES), key=lambda found: found[0])[1:]


def schedule_features(schedule: Schedule, tiles: tuple[int, int]) -> ReadFeatures:
    """A schedule's ranges as the reads of the cost model."""
    queries = np.repeat(schedule.query_stop - schedule.query_start, np.diff(schedule.range_first))
    keys = schedule.row_stop - schedule.row_start
    own, other = schedule.masked, ~schedule.masked
    prefixes = read_features(queries[other], keys[other], tiles)
    return total_features([prefixes, read_features(queries[own], keys[own], tiles, masked=True)])


def total_features(parts: Sequence[ReadFeatures]) -> ReadFeatures:
    """The features of many reads as those of one."""
    return ReadFeatures(*(np.array([float(sum(map(np.sum, column)))]) for column in zip(*parts, strict=True)))


def kernel_us(cost: AttentionCost, sample: KernelSample, backward: bool) -> float:
    """The predicted time of a sample."""
    reads = float(cost.read_us(sample.reads, sample.shape, backward)[0])
    query = float(cost.query_us(np.array(sample.query_rows), sample.shape, backward))
    return reads + query + cost.launch_us(backward)


def fit_kernel(samples: Sequence[KernelSample], backward: bool) -> tuple[KernelCost, float]:
    """The kernel's parameters with the least relative error, and that error (root of the mean square)."""
    flops, moved = (BACKWARD_FLOPS, 2) if backward else (FORWARD_FLOPS, 1)
    design = []
    for reads, query_rows, shape, _ in samples:  # what each of the parameters is a rate of
        pair_us = flops * shape.head_dim * shape.query_heads / 1e6
        row_us = [
            reads.kv_rows[0] * moved * shape.kv_bytes / 1e3,
            query_rows * moved * shape.query_bytes / 1e3,
            reads.query_rows[0] * moved * shape.query_bytes / 1e3,
        ]
        design.append([reads.full_pairs[0] * pair_us, reads.masked_pairs[0] * pair_us, *row_us, reads.ranges[0], 1.0])
    rates, error = fit_rates(np.array(design), np.array([sample.us for sample in samples]), needed=(0,))
    full, masked, kv, query, merge, per_range, launch = rates.tolist()
    cost = KernelCost(
        tflops=1 / full,
        masked=max(masked / full, 0.01),
        kv_gbps=1 / max(kv, 1 / FREE),
        query_gbps=1 / max(query, 1 / FREE),
        merge_gbps=1 / merge if merge > 1 / FREE else 0.0,
        range_us=per_range,
        launch_us=launch,
    )
    return cost, error


def fit_line(amounts: Sequence[float], us: Sequence[float]) -> tuple[float, float]:
    """Time a unit and time at nothing, of measurements that are a line."""
    (slope, start), _ = fit_rates(np.vander(amounts, 2), np.array(us, dtype=np.float64), needed=(0,))
    return float(slope), float(start)


def fit_rates(design: np.ndarray, us: np.ndarray, needed: tuple[int, ...] = ()) -> tuple[np.ndarray, float]:
    """Non-negative rates that bring design @ rates nearest to `us` [samples], relative to it.

    Every choice of columns is tried (there are few), so the result is the best there is. needed: columns that are never
    left out. Returns the rates [columns] and the relative error. Raises ValueError where none fits.
    """
    relative = design / us[:, None]
    best, least = None, np.inf
    free = [column for column in range(design.shape[1]) if column not in needed]
    for chosen in chain.from_iterable(combinations(free, count) for count in range(len(free) + 1)):
        index = [*needed, *chosen]
        rates, *_ = np.linalg.lstsq(relative[:, index], np.ones(len(us)), rcond=None)
        error = float(np.sqrt(np.mean(np.square(relative[:, index] @ rates - 1))))
        if (rates > 0).all() and error < least:
            least = error
            best = np.zeros(design.shape[1])
            best[index] = rates
    if best is None:
        raise ValueError("the measured times grow with nothing that was measured: expected a quieter machine")
    return best, least


def errors(times: Iterable[TimeRow], direction: str, split: str) -> Errors:
    chosen = [row for row in times if (row.direction, row.split) == (direction, split)]
    distance = [abs(row.predicted_us / row.measured_us - 1) for row in chosen]
    return Errors(float(np.median(distance)), float(np.percentile(distance, 95)), len(distance))


def write_times(path: Path, times: Sequence[TimeRow]) -> None:
    with path.open("w", encoding="utf-8", newline="") as lines:
        csv.writer(lines, lineterminator="\n").writerows([TimeRow._fields, *times])


def read_times(path: Path) -> list[TimeRow]:
    """The rows `write_times` wrote. Raises ValueError for another table."""
    kinds = typing.get_type_hints(TimeRow).values()
    with path.open(encoding="utf-8", newline="") as lines:
        table = csv.reader(lines)
        if tuple(next(table, ())) != TimeRow._fields:
            raise ValueError(f"{path}: expected the columns {', '.join(TimeRow._fields)}")
        return [TimeRow(*(kind(cell) for kind, cell in zip(kinds, line, strict=True))) for line in table]


def cluster_text(machine: Machine, about: str) -> str:
    """A machine as a file like those of `conf/cluster/`, written without any library. about: its first line."""
    return "\n".join([f"# {about}", *_lines(dataclasses.asdict(machine))]) + "\n"


def _lines(section: dict[str, Any], indent: str = "") -> Iterator[str]:
    """A section as block YAML. JSON's scalars are YAML's. Four digits are more than anything here is known to."""
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:"
            yield from _lines(value, f"{indent}  ")
        else:
            shown = float(f"{value:.4g}") if isinstance(value, float) else value
            yield f"{indent}{name}: {json.dumps(shown, ensure_ascii=False)}"
