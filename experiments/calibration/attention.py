"""Attention on random ranks' schedules: what it takes here, and the parameters of the cost model that come nearest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from flashcp.experiments.calibration.fit import KernelSample, fit_kernel, kernel_us, total_features
from flashcp.experiments.calibration.links import median_us
from flashcp.kernels.cpu import KV
from flashcp.kernels.schedule import Schedule, build_schedule
from flashcp.kernels.selection import select_attention
from flashcp.sharding.cost import AttentionCost, AttentionShape, ReadFeatures, read_features
from flashcp.sharding.strategies import plan, strategies

__all__ = ["RankSchedule", "fit_attention", "random_schedule", "time_attention"]

TILES = ((128, 64), (64, 64), (32, 32), (16, 16), (64, 1), (32, 1), (16, 1))
"""Tile shapes that are tried: kernels cut as they like, and the best fit tells."""


class RankSchedule(NamedTuple):
    """What one rank of a plan computes, and the rows of its receive buffer."""

    schedule: Schedule
    received_rows: int

    @property
    def query_rows(self) -> int:
        """Rows of its query shards."""
        return int((self.schedule.query_stop - self.schedule.query_start).sum())


def random_schedule(contexts: Sequence[int], world_sizes: Sequence[int], random: np.random.Generator) -> RankSchedule:
    """A rank of a random plan of a random pack: one to 24 documents of very different lengths."""
    context = int(random.choice(contexts))
    weights = random.lognormal(0.0, 1.5, int(random.integers(1, 25)))
    lengths = np.maximum(1, (context * weights / weights.sum()).astype(np.int64))
    ranks = int(random.choice([ranks for ranks in world_sizes if ranks <= lengths.sum()]))
    made = plan(lengths, ranks, str(random.choice(strategies())))
    rank = int(random.integers(ranks))
    local, received = made.local(rank), made.route("exact").received(rank)
    rows = int((received.stop - received.start).sum())
    return RankSchedule(build_schedule(local, local=local, received=received), rows)


def time_attention(
    schedules: Sequence[RankSchedule],
    shape: AttentionShape,
    dtype: torch.dtype,
    repeats: int,
    device: torch.device,
    clock: Callable[[], float],
) -> tuple[list[float], list[float]]:
    """Median us of each schedule, forward and backward."""
    kernel = select_attention("auto", device)
    scale = shape.head_dim**-0.5
    forward, backward = [], []
    for schedule, rows in tqdm(schedules, unit="schedule", desc="attention", delay=2.0):
        queries = int(schedule.query_stop.max())
        q, grad = (torch.randn(queries, shape.query_heads, shape.head_dim, device=device).to(dtype) for _ in range(2))
        local, received = (
            KV(*(torch.randn(count, shape.kv_heads, shape.head_dim, device=device).to(dtype) for _ in range(2)))
            for count in (queries, rows)
        )
        inputs = (q, local, received, schedule, scale)
        out, lse = kernel.attend(*inputs)
        attend = partial(kernel.attend, *inputs)
        gradients = partial(kernel.gradients, grad, q, local, received, out, lse, schedule, scale)
        forward.append(median_us(attend, repeats, device, clock))
        backward.append(median_us(gradients, repeats, device, clock))
    return forward, backward


def fit_attention(
    schedules: Sequence[RankSchedule], times: tuple[list[float], list[float]], fitting: int, shape: AttentionShape
) -> tuple[AttentionCost, tuple[list[float], list[float]]]:
    """The tile shape and parameters with the least error on the first `fitting` schedules.

    times: forward and backward, us. Returns the cost and its predictions for every schedule, forward and backward.
    """
    found = [_fit_tiles(schedules, times, fitting, shape, tiles) for tiles in TILES]
    _, cost, predicted = min(found, key=lambda one: one[0])
    return cost, predicted


def _fit_tiles(
    schedules: Sequence[RankSchedule],
    times: tuple[list[float], list[float]],
    fitting: int,
    shape: AttentionShape,
    tiles: tuple[int, int],
) -> tuple[float, AttentionCost, tuple[list[float], list[float]]]:
    reads = [_features(one.schedule, tiles) for one in schedules]
    forward, backward = (
        [KernelSample(r, one.query_rows, us) for r, one, us in zip(reads, schedules, each, strict=True)]
        for each in times
    )
    there, error = fit_kernel(forward[:fitting], shape, backward=False)
    back, other = fit_kernel(backward[:fitting], shape, backward=True)
    cost = AttentionCost(there, back, *tiles)
    predicted = (
        [kernel_us(cost, sample, shape, backward=False) for sample in forward],
        [kernel_us(cost, sample, shape, backward=True) for sample in backward],
    )
    return error + other, cost, predicted


def _features(schedule: Schedule, tiles: tuple[int, int]) -> ReadFeatures:
    """A schedule's ranges as the reads of the cost model."""
    queries = np.repeat(schedule.query_stop - schedule.query_start, np.diff(schedule.range_first))
    keys = schedule.row_stop - schedule.row_start
    own, other = schedule.masked, ~schedule.masked
    prefixes = read_features(queries[other], keys[other], tiles)
    return total_features([prefixes, read_features(queries[own], keys[own], tiles, masked=True)])
