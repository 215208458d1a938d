"""Plans of many windows at once, on worker processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np

from flashcp.sharding.plan import ShardingPlan

__all__ = ["plan_windows"]

WINDOWS_AT_A_TIME = 8  # handed to a worker together: a plan takes milliseconds


def plan_windows(
    windows: Iterable[np.ndarray],
    world_size: int,
    strategy: str = "flashcp",
    workers: int = 1,
    **options: object,
) -> Iterator[ShardingPlan]:
    """The plan of each window (document lengths, int64 [documents]), in order; the same for any number of workers.

    Workers are fresh processes (torch and its threads may live in this one), so options must be picklable.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: expected a whole number >= 1")
    one = partial(_plan, world_size=world_size, strategy=strategy, options=options)
    if workers == 1:
        yield from map(one, windows)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(one, windows, chunksize=WINDOWS_AT_A_TIME)


def _plan(window: np.ndarray, world_size: int, strategy: str, options: dict[str, object]) -> ShardingPlan:
    from flashcp.sharding.strategies import plan

    return plan(window, world_size, strategy, **options)
