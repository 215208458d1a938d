"""Attention on random ranks' schedules: what it takes here, and the parameters of the cost model that come nearest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashcp.experiments.bench.calibration.fit import KernelSample, fit_kernel, kernel_us, total_features
from flashcp.experiments.bench.kernel_times import KernelTimer, RankSchedule, rank_schedule
from flashcp.experiments.progress import bar
from flashcp.kernels.schedule import Schedule
from flashcp.sharding.strategies import plan, strategies
from flashcp.simulator.cost import AttentionCost, AttentionShape, ReadFeatures, read_features

__all__ = ["fit_attention", "random_schedule", "random_shape", "schedule_features", "time_attention"]

TILES = ((128, 64), (64, 64), (32, 32), (16, 16), (64, 1), (32, 1), (16, 1))
"""Tile shapes that are tried: kernels cut as they like, and the best fit tells."""

SHARES = (1, 2, 4, 8)
"""Of the heads: 1 / that many, as ranks that split heads compute."""


def random_schedule(contexts: Sequence[int], world_sizes: Sequence[int], random: np.random.Generator) -> RankSchedule:
    """A rank of a random plan of a random pack: one to 24 documents of very different lengths."""
    context = int(random.choice(contexts))
    weights = random.lognormal(0.0, 1.5, int(random.integers(1, 25)))
    lengths = np.maximum(1, (context * weights / weights.sum()).astype(np.int64))
    ranks = int(random.choice([ranks for ranks in world_sizes if ranks <= lengths.sum()]))
    made = plan(lengths, ranks, str(random.choice(strategies())))
    one = rank_schedule(made, int(random.integers(ranks)))
    assert one is not None  # every rank reads its own rows
    return one


def random_shape(shape: AttentionShape, random: np.random.Generator) -> AttentionShape:
    """All heads, or the share of them that one of several ranks has."""
    ranks = int(random.choice([ranks for ranks in SHARES if shape.kv_heads % ranks == 0]))
    return shape._replace(query_heads=shape.query_heads // ranks, kv_heads=shape.kv_heads // ranks)


def time_attention(
    schedules: Sequence[RankSchedule], shapes: Sequence[AttentionShape], timer: KernelTimer
) -> tuple[list[float], list[float]]:
    """Median us of each schedule with its heads, forward and backward."""
    both = list(zip(schedules, shapes, strict=True))
    shown = bar(both, unit="schedule", desc="attention", delay=2.0)
    forward, backward = zip(*(timer.times(one, shape) for one, shape in shown), strict=True)
    return list(forward), list(backward)


def fit_attention(
    schedules: Sequence[RankSchedule],
    shapes: Sequence[AttentionShape],
    times: tuple[list[float], list[float]],
    fitting: int,
) -> tuple[AttentionCost, tuple[list[float], list[float]]]:
    """The tile shape and parameters with the least error on the first `fitting` schedules.

    times: forward and backward, us. Returns the cost and its predictions for every schedule, forward and backward.
    """
    found = [_fit_tiles(schedules, shapes, times, fitting, tiles) for tiles in TILES]
    _, cost, predicted = min(found, key=lambda one: one[0])
    return cost, predicted


def _fit_tiles(
    schedules: Sequence[RankSchedule],
    shapes: Sequence[AttentionShape],
    times: tuple[list[float], list[float]],
    fitting: int,
    tiles: tuple[int, int],
) -> tuple[float, AttentionCost, tuple[list[float], list[float]]]:
    reads = [schedule_features(one.schedule, tiles) for one in schedules]
    rows = [one.query_rows for one in schedules]
    forward, backward = ([*map(KernelSample, reads, rows, shapes, each)] for each in times)
    there, error = fit_kernel(forward[:fitting], backward=False)
    back, other = fit_kernel(backward[:fitting], backward=True)
    cost = AttentionCost(there, back, *tiles)
    predicted = (
        [kernel_us(cost, sample, backward=False) for sample in forward],
        [kernel_us(cost, sample, backward=True) for sample in backward],
    )
    return error + other, cost, predicted


def schedule_features(schedule: Schedule, tiles: tuple[int, int]) -> ReadFeatures:
    """A schedule's ranges as the reads of the cost model."""
    queries = np.repeat(schedule.query_stop - schedule.query_start, np.diff(schedule.range_first))
    keys = schedule.row_stop - schedule.row_start
    own, other = schedule.masked, ~schedule.masked
    prefixes = read_features(queries[other], keys[other], tiles)
    return total_features([prefixes, read_features(queries[own], keys[own], tiles, masked=True)])
