"""Run functions under Triton's interpreter, in worker processes that stay alive between calls.

The interpreter is chosen when triton is imported, by an environment variable: processes of their own keep it away from
every other test. `interpreted(fn, *args)` takes a top-level function; `interpreted_together(fn, n, *args)` runs it in n
processes at once, as `fn(rank, *args)`; `interpreted_cases` runs it on the ranks of a gloo group, as `tests/ranks.py`
does. Fresh tensors hold NaN there until written.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import triton

from tests.ranks import Pool

Result = TypeVar("Result")


def interpreted(fn: Callable[..., Result], *args: Any) -> Result:
    """`fn(*args)` in the worker; its exceptions are raised here."""
    _check()
    return _worker(0).submit(fn, *args).result()


def interpreted_together(fn: Callable[..., Result], count: int, *args: Any) -> list[Result]:
    """`fn(rank, *args)` for each rank below `count`, each in its own worker at the same time -> results in rank order.

    The first exception in rank order is raised here, when all have ended: fn must not wait for ever for the others.
    """
    _check()
    workers = [_worker(rank) for rank in range(count)]
    running = [worker.submit(fn, rank, *args) for rank, worker in enumerate(workers)]
    wait(running)
    return [future.result() for future in running]


def interpreted_cases(
    fn: Callable[..., Result], world_size: int, cases: Iterable[Sequence[Any]], timeout_s: float = 60.0
) -> list[list[Result]]:
    """`fn(*case)` for each case on every rank of one group, as `run_cases` does."""
    _check()
    with _variable():
        return _ranks().run(partial(_poisoned, fn), world_size, list(cases), timeout_s)


def _check() -> None:
    """Skip the test on a combination whose interpreter cannot run our kernels."""
    found = {name: tuple(map(int, of.__version__.split(".")[:2])) for name, of in (("triton", triton), ("numpy", np))}
    if found["triton"] < (3, 7) and found["numpy"] >= (2, 4):
        pytest.skip(
            "the interpreter of triton 3.6 takes an array of one element for a loop's bound; numpy 2.4 does not"
        )


@cache
def _worker(number: int) -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_prepare)
    with _variable():
        pool.submit(int).result()  # starts the process, which inherits the variable
    return pool


_ranks = cache(Pool)


@contextmanager
def _variable() -> Iterator[None]:
    """What turns the interpreter on, for processes that start meanwhile."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def _poisoned(fn: Callable[..., Result], *args: Any) -> Result:
    _prepare()
    return fn(*args)


def _prepare() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN
