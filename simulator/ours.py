"""Our implementation under any exchange: rows are read where they lie, and travel while attention is computed.

Forward, overlap `none`: everything arrives, one kernel. `staged`: a kernel on local rows meanwhile, another on the
received ones, merged in fp32. `fused`: one kernel; query tiles come in the order in which the last rows they read
arrive. Backward: gradients of received rows first, they leave together, those of local rows meanwhile (`none`: when the
others have come home), then the owner adds up what came.

`fused` is one-sided: every rank puts its rows into its readers' memory. Else `all_gather` and `compacted` are a
collective there; gradients of their blocks come home directly in any case.
"""

from __future__ import annotations

import numpy as np

from flashcp.sharding.exchanges import EXCHANGES
from flashcp.simulator.flows import carry_all
from flashcp.simulator.planned import Module, Planned
from flashcp.simulator.timeline import Hops, Timeline


def ours(planned: Planned, exchange: str, bare: bool = False) -> Module:
    """One layer. bare: `exact` without the copies before rows leave and after the last kernel."""
    if exchange == "ring":
        return _ring(planned)
    there = _bytes(planned, exchange)
    back = there.T * (_wire(planned, exchange) / planned.shape.dtype_bytes)
    still = np.zeros(planned.ranks)
    alone = _arrivals(planned, exchange, there, still).max() + _homecoming(planned, back, still).max()
    forward, backward = _forward(planned, exchange, there, bare), _backward(planned, exchange, back)
    kept, coming = float(there.sum(axis=0).max()), float(back.sum(axis=0).max())
    if exchange != "exact":
        kept += float(there.max())  # its own block lies among the others
    working = kept * _wire(planned, exchange) / planned.shape.dtype_bytes + coming  # of the buffer, and coming home
    if exchange != "exact" and planned.overlap != "fused":
        working += float(back.sum(axis=1).max())  # side by side, to leave
    return Module(forward, backward, float(alone), kept, working)


def _forward(planned: Planned, exchange: str, there: np.ndarray, bare: bool) -> Timeline:
    timeline = Timeline(planned.ranks)
    # Rows that leave are picked and put side by side once, a block cleared before and written twice.
    moved, launches = (2 * there.sum(axis=1), 1) if exchange == "exact" else (5 * there.max(axis=1), 5)
    timeline.run("copies", planned.copies.us(moved, launches) * (planned.ranks > 1 and not bare))
    arrived = _arrivals(planned, exchange, there, timeline.now)
    timeline.beside("exchange", timeline.now, arrived.max(axis=0))
    attend(planned, timeline, arrived)
    if planned.overlap == "staged" and not bare:  # the fp32 sum is cleared before and narrowed after
        numbers = planned.plan.tokens * (planned.shape.query_heads * planned.shape.head_dim)
        timeline.run("copies", planned.copies.us(numbers * 10.0, launches=2))
    timeline.wait(arrived.max(axis=0))  # also for rows that nobody reads here
    return timeline


def attend(planned: Planned, timeline: Timeline, arrived: np.ndarray) -> None:
    """The forward's launches. arrived: when rows have come from source to destination [N, N]."""
    overlap, last = planned.overlap, arrived.max(axis=0)
    if overlap == "none":
        timeline.wait(last)
        timeline.run("attention", planned.first_us(False) + planned.local_us(False))
    elif overlap == "staged":
        timeline.run("attention", np.diagonal(planned.step_us(False)) + planned.merge_us(planned.plan.tokens))
        timeline.wait(last)
        timeline.run("attention", planned.remote_us(False) + planned.merge_us(planned.remote_rows))
    else:
        _fused(planned, timeline, arrived)


def _backward(planned: Planned, exchange: str, back: np.ndarray) -> Timeline:
    timeline = Timeline(planned.ranks)
    timeline.run("attention", planned.first_us(True))
    if exchange != "exact" and planned.overlap != "fused" and planned.ranks > 1:
        timeline.run("copies", planned.copies.us(2 * back.sum(axis=1)))  # all blocks but its own, side by side
    leave = timeline.now
    home = _homecoming(planned, back, leave).max(axis=0)
    timeline.beside("exchange", leave, home)
    if planned.overlap == "none":
        timeline.wait(home)
    timeline.run("attention", planned.local_us(True))
    timeline.wait(home)
    readers = (back > 0).sum(axis=0)  # K and V of each are added by themselves
    timeline.run("copies", planned.sum_us(back.sum(axis=0), _wire(planned, exchange), 2 * readers))
    return timeline


def _wire(planned: Planned, exchange: str) -> int:
    """Bytes of a number of a gradient on its way home."""
    return planned.setting.wire_bytes(EXCHANGES[exchange].roundings)


def _bytes(planned: Planned, exchange: str) -> np.ndarray:
    """K and V from source to destination [N, N]."""
    if exchange == "exact":
        return planned.traffic * float(planned.shape.kv_bytes)
    blocks = np.full((planned.ranks, planned.ranks), planned.block_bytes(exchange))
    np.fill_diagonal(blocks, 0)
    return blocks


def _arrivals(planned: Planned, exchange: str, moved: np.ndarray, ready: np.ndarray) -> np.ndarray:
    """When bytes have arrived from source to destination [N, N], which ranks have ready at a time [N]."""
    if exchange != "exact" and planned.overlap != "fused":
        links, block = planned.links, float(moved.max())
        return np.full(moved.shape, ready.max() + links.collective_us(block, planned.ranks)) * (moved > 0)
    return carry_all(moved, planned.links, pull=True, release_us=ready[:, None])


def _homecoming(planned: Planned, moved: np.ndarray, leave: np.ndarray) -> np.ndarray:
    """When gradients have come from reader to owner [N, N], which leave each reader together at a time [N]."""
    return carry_all(moved, planned.links, pull=False, release_us=leave[:, None])


def _fused(planned: Planned, timeline: Timeline, arrived: np.ndarray) -> None:
    """One launch whose query tiles come in the order of arrival. arrived: [N, N] (source, destination)."""
    ranks, reads = planned.ranks, planned.reads
    order = np.argsort(arrived, axis=0, kind="stable")  # [place, destination] -> source
    place = 1 + np.argsort(order, axis=0).T
    np.fill_diagonal(place, 0)  # local rows are there
    last = np.where(reads.others > 0, place[reads.rank], 0).max(axis=1)
    shard_us = planned.own_us(False) + planned.read_us(False).sum(axis=1)
    us = np.bincount(reads.rank * (ranks + 1) + last, shard_us, ranks * (ranks + 1))
    groups = us.reshape(ranks, ranks + 1).T
    timeline.run("attention", groups[0] + planned.cost.launch_us())
    in_order = np.take_along_axis(arrived, order, axis=0)
    for group, when in zip(groups[1:], in_order, strict=True):
        if group.any():
            timeline.wait(np.where(group > 0, when, 0.0))
            timeline.run("attention", group)


def _ring(planned: Planned) -> Module:
    """A ring, `staged` block by block under any overlap but `none`.

    A block moves on when it has come and the one before it has been computed on. Gradients start at their owner's
    successor when those of all received rows are there: the first hop goes beside local rows, the others after them,
    each rank adding its share.
    """
    ranks, block = planned.ranks, planned.block_bytes("ring")
    home = block * _wire(planned, "ring") / planned.shape.dtype_bytes
    hop, hop_home = planned.hop_us(block), planned.hop_us(home)
    forward, backward = _ring_forward(planned, Hops(hop)), _ring_backward(planned, Hops(hop_home), home)
    alone = Hops(hop).around() + Hops(hop_home).around()
    kept = (ranks - 1) * block
    return Module(forward, backward, alone, kept, kept * 4 / planned.shape.dtype_bytes + (ranks - 1) * home)


def _ring_forward(planned: Planned, hops: Hops) -> Timeline:
    ranks, timeline = planned.ranks, Timeline(planned.ranks)
    if ranks > 1:
        timeline.run("copies", planned.copies.us(4 * planned.block_bytes("ring"), 4))
    if planned.overlap == "none":
        for _ in range(1, ranks):
            coming = hops.send(timeline.now)
            timeline.beside("exchange", timeline.now, coming)
            timeline.wait(coming)
        timeline.run("attention", planned.first_us(False) + planned.local_us(False))
        return timeline
    for step in range(ranks):
        left = timeline.now
        coming = hops.send(left) if step + 1 < ranks else left
        timeline.beside("exchange", left, coming)
        merge = planned.merge_us(planned.behind(planned.reading_rows, step) if step else planned.plan.tokens)
        timeline.run("attention", planned.behind(planned.step_us(False), step) + merge)
        timeline.wait(coming)
    return timeline


def _ring_backward(planned: Planned, hops: Hops, home: float) -> Timeline:
    timeline, add = Timeline(planned.ranks), planned.sum_us(home, _wire(planned, "ring"))
    beside = planned.overlap != "none"
    timeline.run("attention", planned.first_us(True))
    for hop in range(1, planned.ranks):
        left = timeline.now
        coming = hops.send(left)
        timeline.beside("exchange", left, coming)
        if beside and hop == 1:
            timeline.run("attention", planned.local_us(True))
        timeline.wait(coming)
        timeline.run("copies", add)
    if not beside or planned.ranks == 1:
        timeline.run("attention", planned.local_us(True))
    return timeline
