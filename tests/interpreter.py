"""Run functions under Triton's interpreter, in one worker process that stays alive between calls.

The interpreter is chosen when triton is imported, by an environment variable: a process of its own keeps it away from
every other test. `interpreted(fn, *args)` takes a top-level function. Fresh tensors there hold NaN until written.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def interpreted(fn: Callable[..., Result], *args: Any) -> Result:
    """`fn(*args)` in the worker; its exceptions are raised here."""
    return _worker().submit(fn, *args).result()


@cache
def _worker() -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_prepare)
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        pool.submit(int).result()  # starts the process, which inherits the variable
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    return pool


def _prepare() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN
