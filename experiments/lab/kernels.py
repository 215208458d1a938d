"""How fast a rank of the lab would be on a core of its own: attention and copies, timed before the ranks start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from flashcp.clusters import read_cluster
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.experiments.bench.calibrate import attention_us, copy_cost, random_schedule
from flashcp.experiments.bench.calibration import fit_attention
from flashcp.experiments.bench.kernel_times import KernelTimer
from flashcp.experiments.lab.cases import LabBench
from flashcp.sharding.holders import members_heads
from flashcp.simulator.cost import AttentionShape
from flashcp.simulator.machine import Machine

REST = "this_machine"
"""The cluster file of what is not timed: no module's time depends on it."""
SCHEDULES = 64
REPEATS = 3
PARTS = (4, 2, 1)
"""Of the lab's context and of its ranks, for the random packs and plans."""


def time_kernels(bench: LabBench) -> Machine:
    """A machine of one core: its attention at the heads that the lab's ranks have, fitted to random ranks' schedules of
    random packs, and its copies. Its links mean nothing here.

    Raises RuntimeError where attention differs from the reference, ValueError where times grow with nothing.
    """
    random = np.random.default_rng(bench.seed)
    contexts = [max(2 * bench.world_size, bench.context // part) for part in PARTS]
    sizes = sorted({max(1, bench.world_size // part) for part in PARTS})
    heads = shapes_of(bench)
    with _one_thread():
        timer = KernelTimer(torch.device("cpu"), REPEATS)
        timer.check(bench.shape)
        schedules = [random_schedule(contexts, sizes, random) for _ in range(SCHEDULES)]
        shapes = [heads[index % len(heads)] for index in range(SCHEDULES)]
        times = attention_us(timer, schedules, shapes)
        attention, _ = fit_attention(schedules, shapes, times, SCHEDULES)
        copies = copy_cost(bench.shape, REPEATS, timer.device)
    return replace(read_cluster(REST), name="lab", attention=attention, copies=copies, provenance={})


def shapes_of(bench: LabBench) -> list[AttentionShape]:
    """The heads on which ranks compute under the lab's methods, most first."""
    whole, found = bench.shape, set()
    for works in bench.work(bench.batches[0]).values():
        for work in works:
            split = work.ranks if EXCHANGE_CLASSES[work.exchange].splits_heads else work.head_ranks
            found.add(members_heads(whole.query_heads, whole.kv_heads, split))
    return [whole._replace(query_heads=query, kv_heads=kv) for query, kv in sorted(found, reverse=True)]


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch computes on one, as in a rank."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
