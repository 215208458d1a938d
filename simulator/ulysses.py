"""`ulysses`, published or ours: heads are shared out, so every rank computes on the whole pack for its heads.

Nothing can be hidden: attention needs all of Q, K and V, and the projection after it all of O. As published every
all-to-all packs what it sends and unpacks what it gets; ours packs heads on the way in, computes on rows where they
arrive, and unpacks on the way out, with K and V stacked before.
"""

from __future__ import annotations

import numpy as np

from flashcp.simulator.planned import Module, Planned
from flashcp.simulator.timeline import Timeline


def ulysses(planned: Planned, copies: int, in_order: bool) -> Module:
    """One layer. copies: of what an all-to-all moves, before and after it. in_order: whether it puts documents together
    again, or leaves shards as they came.

    Raises ValueError where ranks cannot share out the heads evenly.
    """
    ranks, own = planned.ranks, planned.heads_shape
    rows = float(planned.plan.tokens.max())
    inward = rows * (own.query_bytes / 2 + own.kv_bytes)  # Q, K and V for one other rank
    outward = rows * own.query_bytes / 2
    alone = 0.0
    timelines = []
    for backward in (False, True):
        # Forward: Q, K, V in, O out. Backward: the gradient of O in, those of Q, K and V out.
        timeline = Timeline(ranks)
        for number, pair in enumerate((outward, inward) if backward else (inward, outward)):
            if number:
                timeline.run("attention", np.full(ranks, planned.heads_us(backward, in_order)))
            exchange = planned.links.all_to_all_us(pair, ranks)
            moved = copies * 2 * pair * ranks
            if pair is inward and not in_order:
                moved += 2 * rows * own.kv_bytes * ranks  # K and V into one tensor first
            timeline.run("copies", planned.copies.us(moved, launches=copies))
            timeline.run("exchange", exchange)
            alone += exchange
        timelines.append(timeline)
    kept = float(planned.plan.offsets[-1]) * own.kv_bytes
    forward_pass, backward_pass = timelines
    return Module(forward_pass, backward_pass, alone, kept, kept)
