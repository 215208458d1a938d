"""Our implementation under any exchange: rows are read where they lie, and travel while attention is computed.

Overlap `none`: everything arrives, one kernel. `staged`: a kernel on local rows meanwhile, another on the received
ones (a `ring`: on each block as it comes), merged in fp32. `fused`: one kernel; query tiles come in the order in which
the last rows they read arrive. A `ring` has no fused kernel: it is staged.
In the backward the gradients of received rows are computed first and travel home while the local ones are computed;
with `fused` they leave source by source.
"""

from __future__ import annotations

import numpy as np

from flashcp.experiments.simulator.flows import carry_all
from flashcp.experiments.simulator.planned import Module, Planned
from flashcp.experiments.simulator.timeline import Timeline
from flashcp.experiments.simulator.ulysses import ulysses

__all__ = ["ours"]

MERGE_BYTES = 12
"""Per number of O when a second kernel adds to a first one's: its result, the fp32 sum read and written."""


def ours(planned: Planned, exchange: str) -> Module:
    """One layer under our implementation."""
    if exchange == "ulysses":
        return ulysses(planned, packs=planned.setting.overlap != "fused", in_order=False)
    overlap, dtype_bytes = planned.setting.overlap, planned.shape.dtype_bytes
    bytes_there = _bytes(planned, exchange)
    wider = planned.setting.gradient_bytes / dtype_bytes
    forward, backward = Timeline(planned.ranks), Timeline(planned.ranks)
    if overlap != "fused":
        forward.run("copies", _pack_us(planned, exchange, bytes_there))
    arrived = _arrivals(planned, exchange, bytes_there, forward.now)
    forward.beside("exchange", forward.now, arrived.max(axis=0))
    _attend(planned, exchange, forward, arrived)
    leave, home = _send_home(planned, exchange, backward, bytes_there.T * wider)
    backward.beside("exchange", leave, home.max(axis=0))
    backward.wait(home.max(axis=0))
    backward.run("copies", _add_us(planned, exchange, bytes_there))
    still = np.zeros(planned.ranks)
    alone = _arrivals(planned, exchange, bytes_there, still).max()
    alone += _homecoming(planned, exchange, bytes_there.T * wider, still).max()
    kept, leaving = float(bytes_there.sum(axis=0).max()), float(bytes_there.sum(axis=1).max())
    working = kept * 4 / dtype_bytes + leaving * wider  # gradients to send, in fp32, and those that come home
    return Module(forward, backward, float(alone), kept, working)


def _bytes(planned: Planned, exchange: str) -> np.ndarray:
    """K and V from source to destination [N, N]; a ring's as if every block came from its owner."""
    if exchange == "exact":
        return planned.reads.traffic * float(planned.shape.kv_bytes)
    blocks = np.full((planned.ranks, planned.ranks), planned.block_bytes(exchange))
    np.fill_diagonal(blocks, 0)
    return blocks


def _arrivals(planned: Planned, exchange: str, moved: np.ndarray, ready: np.ndarray) -> np.ndarray:
    """When bytes have arrived from source to destination [N, N], which ranks have ready at a time [N]."""
    if exchange == "exact":
        release = np.broadcast_to(ready[:, None], moved.shape)
        return carry_all(moved, planned.setting.machine.links, pull=True, release_us=release)
    ranks, every = planned.ranks, np.arange(planned.ranks)
    hop = _hop_us(planned, exchange, float(moved.max()))
    arrived = np.zeros((ranks, ranks))
    now = ready
    for step in range(1, ranks):
        now = np.maximum(now, now[every - 1]) + hop
        arrived[every - step, every] = now
    return arrived


def _homecoming(planned: Planned, exchange: str, moved: np.ndarray, ready: np.ndarray) -> np.ndarray:
    """When gradients have come from reader to owner [N, N]; ready when the reader is [N], or pair by pair [N, N].

    Rings add on the way: a block's gradient starts at its owner's successor, every rank adds its share, the last one
    hands it to the owner.
    """
    ranks, every = planned.ranks, np.arange(planned.ranks)
    release = np.broadcast_to(ready[:, None] if ready.ndim == 1 else ready, moved.shape)
    if exchange == "exact":
        return carry_all(moved, planned.setting.machine.links, pull=False, release_us=release)
    hop = _hop_us(planned, exchange, float(moved.max()))
    home = np.zeros((ranks, ranks))
    now = np.zeros(ranks)  # of the blocks of rank - step, at rank
    for step in range(1, ranks):
        now = np.maximum(now[every - 1], release[every, every - step]) + hop[(every + 1) % ranks]
    home[every - 1, every] = now[every - 1]
    return home


def _hop_us(planned: Planned, exchange: str, block: float) -> np.ndarray:
    """A block from each rank's predecessor: one link for `ring`, all rings of a collective for the others."""
    links, ranks = planned.setting.machine.links, planned.ranks
    if exchange == "ring" or ranks == 1:
        rate, latency = links.neighbour(ranks)
        return block / rate + latency
    return np.full(ranks, links.collective_us(block, ranks) / (ranks - 1))


def _attend(planned: Planned, exchange: str, timeline: Timeline, arrived: np.ndarray) -> None:
    """The forward's kernels. arrived: [N, N] (source, destination)."""
    overlap, launch = planned.setting.overlap, planned.cost.launch_us()
    if overlap == "none":
        timeline.wait(arrived.max(axis=0))
        timeline.run("attention", planned.whole_us(False))
        return
    ranks, reads = planned.ranks, planned.reads
    if exchange == "ring":
        timeline.run("attention", np.diagonal(planned.step_us(False)))
        every = np.arange(ranks)
        for step in range(1, ranks):
            source = every - step
            timeline.wait(arrived[source, every])
            merge = _merge_us(planned, planned.reading_rows[every, source])
            timeline.run("attention", planned.step_us(False)[every, source] + merge)
        return
    if overlap == "staged":
        timeline.run("attention", np.diagonal(planned.step_us(False)))
        timeline.wait(arrived.max(axis=0))
        timeline.run("attention", planned.remote_us(False) + _merge_us(planned, planned.remote_rows))
        return
    order = np.argsort(arrived, axis=0, kind="stable")  # [place, destination] -> source
    place = 1 + np.argsort(order, axis=0).T
    np.fill_diagonal(place, 0)  # local rows are there
    last = np.where(reads.before > 0, place[reads.rank], 0).max(axis=1)
    shard_us = planned.own_us(False) + planned.read_us(False).sum(axis=1)
    us = np.bincount(reads.rank * (ranks + 1) + last, shard_us, ranks * (ranks + 1))
    groups = us.reshape(ranks, ranks + 1).T
    timeline.run("attention", groups[0] + launch)
    in_order = np.take_along_axis(arrived, order, axis=0)
    for group, when in zip(groups[1:], in_order, strict=True):
        if group.any():
            timeline.wait(np.where(group > 0, when, 0.0))
            timeline.run("attention", group)


def _send_home(planned: Planned, exchange: str, timeline: Timeline, moved: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The backward's kernels. When each rank's first gradients leave [N], and when they reach their owners [N, N]."""
    ranks, overlap, launch = planned.ranks, planned.setting.overlap, planned.cost.launch_us(backward=True)
    if overlap == "none":
        timeline.run("attention", planned.whole_us(True))
        return timeline.now, _homecoming(planned, exchange, moved, timeline.now)
    if overlap == "staged":
        timeline.run("attention", planned.remote_us(True) + _merge_us(planned, planned.remote_rows))
        leave = timeline.now
        timeline.run("attention", np.diagonal(planned.step_us(True)))
        return leave, _homecoming(planned, exchange, moved, leave)
    every = np.arange(ranks)
    leaves = np.zeros((ranks, ranks))
    timeline.run("attention", launch)
    for step in range(1, ranks):
        source = every - step
        timeline.run("attention", planned.source_us(True)[every, source])
        leaves[every, source] = timeline.now
    timeline.run("attention", planned.local_us(True))
    first = np.where(moved > 0, leaves, np.inf).min(axis=1)
    return np.where(np.isfinite(first), first, 0.0), _homecoming(planned, exchange, moved, leaves)


def _merge_us(planned: Planned, rows: np.ndarray) -> np.ndarray:
    """What a kernel adds for query rows that another has begun: its result and the sum read, the sum written."""
    numbers = rows * (planned.shape.query_heads * planned.shape.head_dim)
    return planned.setting.machine.copies.us(numbers * MERGE_BYTES, launches=0)


def _pack_us(planned: Planned, exchange: str, moved: np.ndarray) -> np.ndarray:
    """Rows that leave are put side by side first: read and written, for `exact` once a reader."""
    leaving = moved.sum(axis=1) if exchange == "exact" else moved.max(axis=1)
    return planned.setting.machine.copies.us(2 * leaving) * (leaving > 0)


def _add_us(planned: Planned, exchange: str, moved: np.ndarray) -> np.ndarray:
    """Gradients that came home are read, the fp32 sums read and written; rings have added theirs on the way."""
    home = moved.sum(axis=1) if exchange == "exact" else moved.max(axis=1)
    bytes_each = (planned.setting.gradient_bytes + 8) / planned.shape.dtype_bytes
    return planned.setting.machine.copies.us(home * bytes_each) * (home > 0)
