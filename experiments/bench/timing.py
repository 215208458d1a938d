"""How long pieces of work take on the device at hand: medians, of one alone or of several that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

__all__ = ["Clock", "Spread", "Work", "in_turns_ms", "median_us", "own_clock", "rounds_in"]

Clock = Callable[[], float]
"""Seconds since some moment."""
Work = Callable[[], object]
Spread = tuple[float, float, float]
"""20th percentile, median, 80th percentile."""

FLUSH_BYTES = 256 << 20
"""Written before each measurement on a GPU: no work finds its inputs in the L2 cache."""
HELD_S = 1e-3
"""The GPU is kept busy at least this long before a measurement, and twice as long as the host takes to launch the
work: what was launched late would be timed with the host's delay in it."""
MOST_HELD_S = 0.05
CYCLES_PER_S = 2e9
"""Of a GPU's clock, or a little less: where it is slower, the GPU is held longer."""
LEAST_ROUNDS, MOST_ROUNDS = 3, 50


def median_us(work: Work, repeats: int, device: torch.device, clock: Clock = time.perf_counter) -> float:
    """Median time of a piece of work, after once to warm up: by `clock` on a CPU, by the device's own on a GPU."""
    if device.type == "cuda":
        return 1e3 * float(np.median(_on_gpu({"": work}, device, lambda _: repeats)[""]))
    times = []
    for _ in range(repeats + 1):
        started = clock()
        work()
        times.append(1e6 * (clock() - started))
    return float(np.median(times[1:]))


def in_turns_ms(work: Mapping[str, Work], device: torch.device, seconds: float) -> dict[str, Spread]:
    """Milliseconds of each piece of work. They take turns, round after round, for about so many seconds."""
    if device.type == "cuda":
        times = _on_gpu(work, device, lambda round_s: rounds_in(seconds, round_s))
    else:
        times = _on_cpu(work, lambda round_s: rounds_in(seconds, round_s))
    return {name: _spread(found) for name, found in times.items()}


def rounds_in(seconds: float, round_s: float) -> int:
    """How many rounds, each of so long, are measured: at least three, at most fifty."""
    return int(min(MOST_ROUNDS, max(LEAST_ROUNDS, seconds / max(round_s, 1e-9))))


def own_clock(device: torch.device, threads: int) -> Clock:
    """One thread's work by its own time, which others on the machine do not lengthen; else the wall's."""
    return time.thread_time if device.type == "cpu" and threads == 1 else time.perf_counter


def _spread(times: list[float]) -> Spread:
    low, middle, high = np.quantile(times, (0.2, 0.5, 0.8)).tolist()
    return low, middle, high


def _on_cpu(work: Mapping[str, Work], rounds: Callable[[float], int]) -> dict[str, list[float]]:
    def once(function: Work) -> float:
        started = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - started)

    round_ms = sum(once(function) for function in work.values())
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds(round_ms / 1e3)):
        for name, function in work.items():
            times[name].append(once(function))
    return times


def _on_gpu(work: Mapping[str, Work], device: torch.device, rounds: Callable[[float], int]) -> dict[str, list[float]]:
    """Milliseconds by the device's clock. The host launches a whole round ahead of it: nothing waits for the host."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    cycles = {}
    for name, function in work.items():
        function()  # compiles, allocates
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        function()
        launch_s = time.perf_counter() - started
        torch.cuda.synchronize(device)
        cycles[name] = int(CYCLES_PER_S * min(MOST_HELD_S, max(HELD_S, 2 * launch_s)))

    def once(name: str) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(cycles[name])
        start.record()
        work[name]()
        stop.record()
        return start, stop

    started = time.perf_counter()
    for name in work:
        once(name)
    torch.cuda.synchronize(device)
    count = rounds(time.perf_counter() - started)
    events = [(name, once(name)) for _ in range(count) for name in work]
    torch.cuda.synchronize(device)
    return {name: [start.elapsed_time(stop) for of, (start, stop) in events if of == name] for name in work}
