"""`ulysses`, published or ours: heads are shared out, so every rank computes on the whole pack for its heads.

Nothing can be hidden: attention needs all of Q, K and V, and the projection after it all of O. As published, and ours
where rows travel by two-sided messages (any overlap but `fused`), every all-to-all packs what it sends and unpacks what
it gets; one-sided ones read and write rows where they lie.
"""

from __future__ import annotations

import numpy as np

from flashcp.experiments.simulator.planned import Module, Planned
from flashcp.experiments.simulator.timeline import Timeline
from flashcp.sharding.cost import read_features

__all__ = ["ulysses"]


def ulysses(planned: Planned, packs: bool) -> Module:
    """One layer. packs: whether every all-to-all copies what it moves, before and after.

    Raises ValueError where ranks cannot share out the heads evenly.
    """
    ranks, shape, machine = planned.ranks, planned.shape, planned.setting.machine
    if shape.query_heads % ranks or shape.kv_heads % ranks:
        raise ValueError(
            f"query_heads={shape.query_heads}, kv_heads={shape.kv_heads}: ulysses expects multiples of "
            f"world_size={ranks}"
        )
    own = shape._replace(query_heads=shape.query_heads // ranks, kv_heads=shape.kv_heads // ranks)
    lengths = planned.plan.document_lengths
    documents = read_features(lengths, lengths, planned.cost.tiles, masked=True)
    rows = float(planned.plan.tokens.max())
    inward = rows * (own.query_bytes / 2 + own.kv_bytes)  # Q, K and V for one other rank
    outward = rows * own.query_bytes / 2
    alone = 0.0
    timelines = []
    for backward in (False, True):
        time = planned.cost.read_us(documents, own, backward) + planned.cost.query_us(lengths, own, backward)
        attention = float(time.sum()) + planned.cost.launch_us(backward)
        # Forward: Q, K, V in, O out. Backward: the gradient of O in, those of Q, K and V out.
        timeline = Timeline(ranks)
        for number, pair in enumerate((outward, inward) if backward else (inward, outward)):
            if number:
                timeline.run("attention", np.full(ranks, attention))
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
