"""`ulysses`, published or ours: heads are shared out, so every rank computes on the whole pack for its heads.

Nothing can be hidden: attention needs all of Q, K and V, and the projection after it all of O. As published, and ours
where rows travel by two-sided messages (any overlap but `fused`), every all-to-all packs what it sends and unpacks what
it gets; one-sided ones read and write rows where they lie.
"""

from __future__ import annotations

import numpy as np

from flashcp.experiments.simulator.planned import Module, Planned
from flashcp.experiments.simulator.timeline import Timeline

__all__ = ["ulysses"]


def ulysses(planned: Planned, packs: bool, in_order: bool) -> Module:
    """One layer. packs: whether every all-to-all copies what it moves, before and after. in_order: whether it puts
    documents together again, or leaves shards as they came.

    Raises ValueError where ranks cannot share out the heads evenly.
    """
    ranks, machine, own = planned.ranks, planned.setting.machine, planned.heads_shape
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
            copy = machine.copies.us(2 * pair * ranks, launches=1) if packs else 0.0
            exchange = machine.links.all_to_all_us(pair, ranks)
            timeline.run("copies", copy)
            timeline.run("exchange", exchange)
            timeline.run("copies", copy)
            alone += exchange
        timelines.append(timeline)
    kept = float(planned.plan.offsets[-1]) * own.kv_bytes
    forward_pass, backward_pass = timelines
    return Module(forward_pass, backward_pass, alone, kept, kept)
