"""How long a piece of work takes on the device at hand: its median time over some repeats."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

__all__ = ["Clock", "median_us", "own_clock"]

Clock = Callable[[], float]
"""Seconds since some moment."""

FLUSH_BYTES = 256 << 20
"""Written before each measurement on a GPU: no work finds its inputs in the L2 cache, and the host gets ahead."""


def median_us(
    work: Callable[[], object], repeats: int, device: torch.device, clock: Clock = time.perf_counter
) -> float:
    """Median time of a piece of work, after once to warm up: by `clock` on a CPU, by the device's own on a GPU."""
    if device.type == "cuda":
        return _on_gpu(work, repeats, device)
    times = []
    for _ in range(repeats + 1):
        started = clock()
        work()
        times.append(1e6 * (clock() - started))
    return float(np.median(times[1:]))


def own_clock(device: torch.device, threads: int) -> Clock:
    """One thread's work by its own time, which others on the machine do not lengthen; else the wall's."""
    return time.thread_time if device.type == "cpu" and threads == 1 else time.perf_counter


def _on_gpu(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    work()
    torch.cuda.synchronize(device)
    events = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        work()
        stop.record()
        events.append((start, stop))
    torch.cuda.synchronize(device)
    return float(np.median([1e3 * start.elapsed_time(stop) for start, stop in events]))
