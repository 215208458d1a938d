"""Published methods as well as anybody could run them: our kernel, transfers beside attention, no copies but one sum.

Nobody's code does this, ours neither: blocks go round as NCCL's collectives take them (across nodes, all ports of a
node in turn) and are computed on as they come, gradients leave block by block, no wider than the model's dtype, and are
added up on their way. So that a plan is not praised for its implementation. Where bandwidth counts nothing that was
published, and nothing of ours, is faster; where latency does, N - 1 hops are not the best there is.
"""

from __future__ import annotations

import numpy as np

from flashcp.simulator.ours import attend, ours
from flashcp.simulator.planned import Module, Planned
from flashcp.simulator.timeline import Hops, Timeline


def best_effort(planned: Planned, exchange: str) -> Module:
    if exchange == "exact":
        return ours(planned, exchange, bare=True)
    ranks, block = planned.ranks, planned.block_bytes(exchange)
    wire, home = planned.shape.dtype_bytes, block
    hop, hop_home = (_hop_us(planned, exchange, moved) for moved in (block, home))
    forward, backward = _forward(planned, Hops(hop)), _backward(planned, Hops(hop_home), home, wire)
    alone = Hops(hop).around() + Hops(hop_home).around()
    kept = (ranks - 1) * block
    return Module(forward, backward, alone, kept, kept * 4 / planned.shape.dtype_bytes + home * (ranks > 1))


def _hop_us(planned: Planned, exchange: str, block: float) -> np.ndarray:
    """A block from each rank's predecessor: one link for `ring`, all rings of a collective for the others."""
    links, ranks = planned.links, planned.ranks
    if exchange == "ring" or ranks == 1:
        return planned.hop_us(block)
    return np.full(ranks, links.collective_us(block, ranks) / (ranks - 1))


def _forward(planned: Planned, hops: Hops) -> Timeline:
    ranks, every = planned.ranks, np.arange(planned.ranks)
    timeline, arrived = Timeline(ranks), np.zeros((ranks, ranks))
    come = timeline.now
    for step in range(1, ranks):
        come = hops.send(come)
        arrived[every - step, every] = come
    timeline.beside("exchange", 0.0, come)
    attend(planned, timeline, arrived)
    return timeline


def _backward(planned: Planned, hops: Hops, home: float, wire: int) -> Timeline:
    ranks, every, overlap = planned.ranks, np.arange(planned.ranks), planned.overlap
    timeline, leaves = Timeline(ranks), np.zeros((ranks, ranks))  # when a rank's share of an owner's gradient is there
    timeline.run("attention", planned.cost.launch_us(backward=True))
    for step in range(1, ranks):
        timeline.run("attention", planned.behind(planned.source_us(True), step))
        leaves[every, every - step] = timeline.now
    if overlap == "staged":
        leaves[:] = timeline.now[:, None]
    timeline.run("attention", planned.local_us(True))
    if overlap == "none":
        leaves[:] = timeline.now[:, None]
    come = np.zeros(ranks)
    for step in range(1, ranks):
        come = hops.send(np.maximum(come, planned.behind(leaves, step)))
    timeline.beside("exchange", planned.behind(leaves, 1), come)
    timeline.wait(come)
    timeline.run("copies", planned.sum_us(home, wire) * (ranks > 1))
    return timeline
