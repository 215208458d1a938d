"""Run functions under Triton's interpreter, in worker processes that stay alive between calls.

The interpreter is chosen when triton is imported, by an environment variable: a process of its own keeps it away from
every other test. `interpreted(fn, *args)` takes a top-level function; `interpreted_together(fn, n, *args)` runs it in n
processes at once, as `fn(rank, *args)`. Fresh tensors there hold NaN until written.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from functools import cache
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def interpreted(fn: Callable[..., Result], *args: Any) -> Result:
    """`fn(*args)` in the worker; its exceptions are raised here."""
    return _worker(0).submit(fn, *args).result()


def interpreted_together(fn: Callable[..., Result], count: int, *args: Any) -> list[Result]:
    """`fn(rank, *args)` for each rank below `count`, each in its own worker at the same time -> results in rank order.

    The first exception in rank order is raised here, when all have ended: fn must not wait for ever for the others.
    """
    workers = [_worker(rank) for rank in range(count)]
    running = [worker.submit(fn, rank, *args) for rank, worker in enumerate(workers)]
    wait(running)
    return [future.result() for future in running]


@cache
def _worker(number: int) -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_prepare)
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        pool.submit(int).result()  # starts process `number`, which inherits the variable
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    return pool


def _prepare() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN
