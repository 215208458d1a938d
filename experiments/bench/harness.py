"""What benchmarks share: exact results and errors, the time of work alone or in turns, rows and a table of them."""

from __future__ import annotations

import csv
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

import flashcp
from flashcp.experiments.sweep.results import Number, Row, commit, to_row
from flashcp.kernels.reference import reference_attention
from flashcp.text import table
from flashcp.train.ranks import Ranks

Clock = Callable[[], float]
"""Seconds since some moment."""
Work = Callable[[], object]
Spread = tuple[float, float, float]
"""20th percentile, median, 80th percentile."""
Key = TypeVar("Key")

FLUSH_BYTES = 256 << 20
"""Written before each measurement on a GPU: no work finds its inputs in the L2 cache."""
HELD_S = 1e-3
"""The GPU is kept busy at least this long before a measurement, and twice as long as the host takes to launch the
work: what was launched late would be timed with the host's delay in it."""
MOST_HELD_S = 0.05
CYCLES_PER_S = 2e9
"""Of a GPU's clock, or a little less: where it is slower, the GPU is held longer."""


def relative_error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference||; inf for anything that is not finite."""
    difference, norm = (value.double() - reference.double()).norm().item(), reference.double().norm().item()
    error = difference / (norm or 1.0)
    return error if math.isfinite(error) else math.inf


def exact_results(qkv: Sequence[Tensor], grad: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """Output and gradients of q, k and v by the reference, all in float64. grad: of the output."""
    q, k, v = leaves = [x.detach().double().requires_grad_() for x in qkv]
    out = reference_attention(q, k, v, lengths)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.double())


def median_us(work: Work, repeats: int, device: torch.device, clock: Clock | None = None) -> float:
    """Median time of a piece of work, after once to warm up: on a GPU by the device's clock.

    clock: on a CPU; None: one thread's work by its own time, which others on the machine do not lengthen, else the
    wall's.
    """
    if device.type == "cuda":
        return 1e3 * float(np.median(_on_gpu({"": work}, device, lambda _: repeats)[""]))
    clock = clock or (time.thread_time if torch.get_num_threads() == 1 else time.perf_counter)
    return 1e3 * float(np.median(in_turns({"": work}, Ranks(0, 1, device), rounds=repeats, clock=clock)[""]))


def in_turns_ms(work: Mapping[str, Work], device: torch.device, seconds: float) -> dict[str, Spread]:
    """Milliseconds of each piece of work. They take turns, round after round, for about so many seconds."""
    times: Mapping[str, Sequence[float] | np.ndarray]
    if device.type == "cuda":
        times = _on_gpu(work, device, lambda round_s: rounds_in(seconds, round_s))
    else:
        times = in_turns(work, Ranks(0, 1, device), seconds, bounds=(3, 50))
    return {name: spread(found) for name, found in times.items()}


def in_turns(
    work: Mapping[Key, Work],
    ranks: Ranks,
    seconds: float = 0.0,
    rounds: int = 0,
    bounds: tuple[int, int] = (5, 100),
    clock: Clock = time.perf_counter,
) -> dict[Key, np.ndarray]:
    """Milliseconds of each function on this rank, [rounds], one after the other in each round, by the host's clock.

    Before each, all ranks wait for each other. The first round warms up and is not among them. rounds: 0 for as many as
    fit into `seconds`, within `bounds`.
    """

    def once(function: Work) -> float:
        ranks.barrier()
        started = clock()
        function()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
        return 1e3 * (clock() - started)

    began = time.perf_counter()
    for function in work.values():
        once(function)
    round_s = ranks.max(time.perf_counter() - began)[0]
    rounds = rounds or rounds_in(seconds, round_s, *bounds)
    times = [[once(function) for function in work.values()] for _ in range(rounds)]
    return dict(zip(work, np.array(times).T, strict=True))


def rounds_in(seconds: float, round_s: float, least: int = 3, most: int = 50) -> int:
    """How many rounds, each of so long, are measured."""
    return int(min(most, max(least, seconds / max(round_s, 1e-9))))


def spread(values: Sequence[float] | np.ndarray) -> Spread:
    low, middle, high = np.percentile(values, (20, 50, 80)).tolist()
    return low, middle, high


def rows_table(rows: Sequence[Row], names: Mapping[str, str], of: str) -> str:
    """A line for each that the fields `names` (by title) tell apart, as text.

    of: whose columns of `columns.csv` are shown; those of metrics that no row has are left out.
    """
    key = attrgetter(*names.values(), "metric")
    cells = {key(row): row.median for row in rows}
    metrics = {row.metric for row in rows}
    with Path(__file__).with_name("columns.csv").open(encoding="utf-8", newline="") as lines:
        columns = [column for column in csv.DictReader(lines) if column["of"] == of and column["metric"] in metrics]
    body = []
    for line in dict.fromkeys(key(row)[:-1] for row in rows):
        found = [(cells.get((*line, column["metric"])), column) for column in columns]
        shown = ["" if value is None else format(float(x["factor"]) * value, x["form"]) for value, x in found]
        body.append([*line, *shown])
    return table([*names, *(column["title"] for column in columns)], body, text=len(names))


def case_row(case: str, number: Number) -> Row:
    """A number of a host-only measurement with its provenance."""
    device, of_versions, *_ = provenance()
    return to_row(case, number, device, of_versions=of_versions)


def provenance() -> tuple[str, str, str, str]:
    """What a row of a host-only measurement carries: device (how many cores, of what), versions, commit, date."""
    numba = f"numba {version('numba')}" if find_spec("numba") else "no numba"
    versions = f"flashcp {flashcp.__version__}, numpy {np.__version__}, {numba}, python {platform.python_version()}"
    return f"{os.cpu_count()}-core CPU ({platform.machine()})", versions, commit(), f"{datetime.now(UTC):%Y-%m-%d}"


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
