"""The methods as their authors run them: collectives that nothing hides, copies, and a kernel for every step of a ring.

The paper's table adds up: copies, attention, all-gather and reduce-scatter follow one another. Half of a method's
copies are counted in the forward and half in the backward. Gradients travel in the model's dtype, in a ring in fp32.
"""

from __future__ import annotations

import numpy as np

from flashcp.experiments.simulator.planned import Module, Planned
from flashcp.experiments.simulator.timeline import Timeline
from flashcp.experiments.simulator.ulysses import ulysses
from flashcp.sharding.strategies.per_sequence import per_sequence

__all__ = ["published"]

MERGE_BYTES = 18
"""Forward, per number of O and ring step: the step's result is read (2) and widened (4), the sum read with it (4 + 4)
and written (4); ring-flash-attention's merge, compiled into one kernel after the widening."""
SUM_BYTES = 10
"""Backward, per number of a gradient and ring step: the step's is read (2), the fp32 sum read and written (4 + 4)."""
RING_GRADIENT_BYTES = 4


def published(planned: Planned, exchange: str) -> Module:
    """One layer under a method as published."""
    if exchange == "ulysses":
        return ulysses(planned, packs=True)
    return _ring(planned) if exchange == "ring" else _gathered(planned, exchange)


def _gathered(planned: Planned, exchange: str) -> Module:
    machine, ranks = planned.setting.machine, planned.ranks
    block = planned.block_bytes(exchange)
    collective = machine.links.collective_us(block, ranks)
    copies = _copies_us(planned, exchange) / 2
    forward, backward = Timeline(ranks), Timeline(ranks)
    forward.run("exchange", collective)
    forward.run("copies", copies)
    forward.run("attention", planned.whole_us(False))
    backward.run("attention", planned.whole_us(True))
    backward.run("copies", copies)
    backward.meet()
    backward.run("exchange", collective)
    return Module(forward, backward, 2 * collective, ranks * block, ranks * block)


def _copies_us(planned: Planned, exchange: str) -> float:
    """Copies of forward and backward together."""
    machine, plan = planned.setting.machine, planned.plan
    costs = machine.published
    shards = len(planned.reads.rank)
    if exchange == "compacted":
        passes = costs.compacted_passes
    elif _chunks_of_the_window(planned):
        passes, shards = costs.gathered_passes, 2 * planned.ranks
    else:
        passes = costs.shuffled_passes
    moved = 2 * passes * float(plan.offsets[-1]) * planned.shape.kv_bytes
    return float(machine.copies.us(moved, launches=0)) + shards * costs.shard_us


def _chunks_of_the_window(planned: Planned) -> bool:
    """Whether the plan is `per_sequence`'s, which `wlb_adaptive` may have chosen too."""
    plan = planned.plan
    if plan.strategy != "wlb_adaptive":
        return plan.strategy == "per_sequence"
    table = per_sequence(plan.document_lengths, plan.world_size)
    held = np.bincount(table.rank, table.stop - table.start, plan.world_size)
    work = np.bincount(table.rank, (table.start + table.stop + 1) * (table.stop - table.start) / 2, plan.world_size)
    return np.array_equal(held, plan.tokens) and np.allclose(work, plan.work)


def _ring(planned: Planned) -> Module:
    """One kernel a step on the block at hand, while the next one comes from the neighbour."""
    ranks, block = planned.ranks, planned.block_bytes("ring")
    rate, latency = planned.setting.machine.links.neighbour(ranks)
    home = block * RING_GRADIENT_BYTES / planned.shape.dtype_bytes
    forward, backward = Timeline(ranks), Timeline(ranks)
    hop = block / rate + latency
    hop_back = (block + home) / rate + latency  # KV goes round again, its gradient with it
    for step in range(ranks):
        begin = np.maximum(forward.now, forward.before(forward.now))
        _ring_step(planned, forward, step, backward=False)
        if step + 1 < ranks:
            forward.beside("exchange", begin, begin + hop)
            forward.wait(begin + hop)
    passed = np.zeros(ranks)  # when the predecessor had added its share to the gradient that comes here
    for step in range(ranks):
        begin = np.maximum(backward.now, backward.before(backward.now))
        _ring_step(planned, backward, step, backward=True)
        if step:
            backward.wait(backward.before(passed) + hop_back)
            backward.run("copies", _sum_us(planned))
        passed = backward.now
        if step + 1 < ranks:
            backward.beside("exchange", begin, begin + hop_back)
            backward.wait(begin + hop_back)
    if ranks > 1:
        backward.wait(backward.before(passed) + hop_back)
    alone = (ranks - 1) * float(hop.max() + hop_back.max())
    return Module(forward, backward, alone, 0.0, 2 * (block + home))


def _ring_step(planned: Planned, timeline: Timeline, step: int, backward: bool) -> None:
    """Every rank computes on the block of rank - step."""
    ranks, shape, cost = planned.ranks, planned.shape, planned.cost
    every = np.arange(ranks)
    source = (every - step) % ranks
    busy = planned.source_us(backward)[every, source]
    if step == 0:
        timeline.run("attention", busy + planned.by_rank(planned.own_us(backward)) + cost.launch_us(backward))
        return
    rows = planned.reading_rows[every, source]
    timeline.run("attention", busy + cost.query_us(rows, shape, backward) + (rows > 0) * cost.launch_us(backward))
    moved = rows * shape.query_heads * shape.head_dim * (SUM_BYTES if backward else MERGE_BYTES)
    timeline.run("copies", planned.setting.machine.copies.us(moved, launches=0))


def _sum_us(planned: Planned) -> np.ndarray:
    """A block's K and V gradients added to those that came round."""
    numbers = planned.plan.tokens * 2 * planned.shape.kv_heads * planned.shape.head_dim
    return planned.setting.machine.copies.us(numbers * SUM_BYTES, launches=0)
