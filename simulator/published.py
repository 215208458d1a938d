"""The methods as their authors run them: collectives that nothing hides, and copies; the rings are in their own file.

The paper's table adds up: copies, attention, all-gather and reduce-scatter follow one another. Half of a method's
copies are counted in the forward and half in the backward. Gradients travel in the model's dtype.
"""

from __future__ import annotations

from flashcp.sharding.strategies import plan as make_plan
from flashcp.simulator.planned import Module, Planned
from flashcp.simulator.published_ring import published_ring
from flashcp.simulator.timeline import Timeline
from flashcp.simulator.ulysses import ulysses

__all__ = ["published"]


def published(planned: Planned, exchange: str) -> Module:
    """One layer under a method as published."""
    if exchange == "ulysses":
        return ulysses(planned, copies=2, in_order=True)
    return published_ring(planned) if exchange == "ring" else _gathered(planned, exchange)


def _gathered(planned: Planned, exchange: str) -> Module:
    ranks, block = planned.ranks, planned.block_bytes(exchange)
    collective = planned.links.collective_us(block, ranks)
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
    costs, shards = planned.machine.published, len(planned.reads.rank)
    if exchange == "compacted":
        passes = costs.compacted_passes
    elif _chunks_of_the_window(planned):
        passes, shards = costs.gathered_passes, 2 * planned.ranks
    else:
        passes = costs.shuffled_passes
    moved = 2 * passes * float(planned.plan.offsets[-1]) * planned.shape.kv_bytes
    return float(planned.copies.us(moved, launches=0)) + shards * costs.shard_us


def _chunks_of_the_window(planned: Planned) -> bool:
    """Whether the plan is `per_sequence`'s, which `wlb_adaptive` may have chosen too."""
    plan = planned.plan
    if plan.strategy != "wlb_adaptive":
        return plan.strategy == "per_sequence"
    return plan == make_plan(plan.document_lengths, plan.world_size, "per_sequence")
