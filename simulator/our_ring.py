"""Our ring, `staged` block by block under any overlap but `none`.

A block moves on when it has come and the one before it has been computed on. Gradients start at their owner's successor
when those of all received rows are there: the first hop goes beside local rows, the others after them, each rank adding
its share.
"""

from __future__ import annotations

import numpy as np

from flashcp.simulator.planned import Module, Planned
from flashcp.simulator.timeline import Hops, Timeline

__all__ = ["our_ring"]


def our_ring(planned: Planned) -> Module:
    """One layer of `ring` under our implementation."""
    ranks, block = planned.ranks, planned.block_bytes("ring")
    home = block * planned.setting.gradient_bytes / planned.shape.dtype_bytes
    hop, hop_home = planned.hop_us(block), planned.hop_us(home)
    forward, backward = _forward(planned, Hops(hop)), _backward(planned, Hops(hop_home), home)
    alone = Hops(hop).around() + Hops(hop_home).around()
    kept = (ranks - 1) * block
    return Module(forward, backward, alone, kept, kept * 4 / planned.shape.dtype_bytes + (ranks - 1) * home)


def _forward(planned: Planned, hops: Hops) -> Timeline:
    ranks, every = planned.ranks, np.arange(planned.ranks)
    timeline, steps = Timeline(ranks), planned.step_us(False)
    if ranks > 1:
        timeline.run("copies", planned.copies.us(4 * planned.block_bytes("ring"), 4))
    if planned.setting.overlap == "none":
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
        merge = planned.merge_us(planned.reading_rows[every, every - step] if step else planned.plan.tokens)
        timeline.run("attention", steps[every, every - step] + merge)
        timeline.wait(coming)
    return timeline


def _backward(planned: Planned, hops: Hops, home: float) -> Timeline:
    timeline, add = Timeline(planned.ranks), planned.sum_us(home, planned.setting.gradient_bytes)
    beside = planned.setting.overlap != "none"
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
