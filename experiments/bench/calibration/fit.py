"""From measured times to the parameters of a cost model: least squares in which no parameter may be negative."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from flashcp.simulator.cost import AttentionCost, AttentionShape, KernelCost, ReadFeatures

__all__ = ["KernelSample", "fit_kernel", "fit_line", "fit_rates", "kernel_us", "total_features"]

FREE = 1e6  # GB/s: what a part that the measurements do not show is given


class KernelSample(NamedTuple):
    """One kernel's work: its reads' features, the query rows it holds, its heads, and the time it took."""

    reads: ReadFeatures
    query_rows: int
    shape: AttentionShape
    us: float


def total_features(parts: Sequence[ReadFeatures]) -> ReadFeatures:
    """The features of many reads as those of one."""
    return ReadFeatures(*(np.array([float(sum(np.sum(part[i]) for part in parts))]) for i in range(5)))


def kernel_us(cost: AttentionCost, sample: KernelSample, backward: bool) -> float:
    """The predicted time of a sample."""
    reads = float(cost.read_us(sample.reads, sample.shape, backward)[0])
    query = float(cost.query_us(np.array(sample.query_rows), sample.shape, backward))
    return reads + query + cost.launch_us(backward)


def fit_kernel(samples: Sequence[KernelSample], backward: bool) -> tuple[KernelCost, float]:
    """The kernel's parameters with the least relative error, and that error (root of the mean square)."""
    design = np.array([_parts(sample, backward) for sample in samples])
    rates, error = fit_rates(design, np.array([sample.us for sample in samples]), needed=(0,))
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


def _parts(sample: KernelSample, backward: bool) -> list[float]:
    """What each of the parameters is a rate of."""
    shape, reads = sample.shape, sample.reads
    pair_us = (10 if backward else 4) * shape.head_dim * shape.query_heads / 1e6
    moved = 2 if backward else 1
    return [
        reads.full_pairs[0] * pair_us,
        reads.masked_pairs[0] * pair_us,
        reads.kv_rows[0] * moved * shape.kv_bytes / 1e3,
        sample.query_rows * moved * shape.query_bytes / 1e3,
        reads.query_rows[0] * moved * shape.query_bytes / 1e3,
        reads.ranges[0],
        1.0,
    ]


def fit_line(amounts: Sequence[float], us: Sequence[float]) -> tuple[float, float]:
    """Time a unit and time at nothing, of measurements that are a line."""
    design = np.stack((np.asarray(amounts, dtype=np.float64), np.ones(len(us))), axis=1)
    (slope, start), _ = fit_rates(design, np.asarray(us, dtype=np.float64), needed=(0,))
    return float(slope), float(start)


def fit_rates(design: np.ndarray, us: np.ndarray, needed: tuple[int, ...] = ()) -> tuple[np.ndarray, float]:
    """Non-negative rates that bring design @ rates nearest to `us` [samples], relative to it.

    Every choice of columns is tried (there are few), so the result is the best there is. needed: columns that are never
    left out. Returns the rates [columns] and the relative error. Raises ValueError where none fits.
    """
    columns = design.shape[1]
    relative = design / us[:, None]
    best, least = None, np.inf
    free = [column for column in range(columns) if column not in needed]
    for count in range(len(free) + 1):
        for chosen in combinations(free, count):
            index = [*needed, *chosen]
            rates, *_ = np.linalg.lstsq(relative[:, index], np.ones(len(us)), rcond=None)
            error = float(np.sqrt(np.mean(np.square(relative[:, index] @ rates - 1))))
            if (rates > 0).all() and error < least:
                least = error
                best = np.zeros(columns)
                best[index] = rates
    if best is None:
        raise ValueError("the measured times grow with nothing that was measured: expected a quieter machine")
    return best, least
