"""One function over many packs, on this process or on several."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from flashcp.sharding.values import read_whole

Pack = TypeVar("Pack")
Result = TypeVar("Result")
MOST_WORKERS = 1024
AT_A_TIME = 16  # packs handed to a worker together: one takes some ten milliseconds


def map_ordered(function: Callable[[Pack], Result], packs: Iterable[Pack], workers: int = 1) -> Iterator[Result]:
    """The function's result for each pack, in order; the same for any number of workers.

    Workers are fresh processes (torch and its threads may live in this one), so all that goes there must be picklable.
    Raises ValueError for no workers, and for more than MOST_WORKERS.
    """
    workers = read_whole("workers", workers, most=MOST_WORKERS)
    if workers == 1:
        yield from map(function, packs)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, packs, chunksize=AT_A_TIME)
