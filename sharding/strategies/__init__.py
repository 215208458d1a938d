"""Strategies: document lengths and a world size in, shards out. Each is a pure function, listed once here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from flashcp.sharding.documents import read_document_lengths, read_world_size
from flashcp.sharding.mask import Mask
from flashcp.sharding.masks import Workload, read_workload
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.shards import ShardTable
from flashcp.sharding.strategies.equal_pieces import contiguous, per_document, per_sequence
from flashcp.sharding.strategies.flashcp import flashcp
from flashcp.sharding.strategies.flashcp_paper import flashcp_paper
from flashcp.sharding.strategies.wlb_adaptive import wlb_adaptive
from flashcp.sharding.values import check_choice, shown

__all__ = ["STRATEGIES", "plan", "plan_workload", "strategies"]

STRATEGIES: dict[str, Callable[..., ShardTable]] = {
    "contiguous": contiguous,
    "per_sequence": per_sequence,
    "per_document": per_document,
    "wlb_adaptive": wlb_adaptive,
    "flashcp_paper": flashcp_paper,
    "flashcp": flashcp,
}


def strategies() -> tuple[str, ...]:
    """The names that `plan` takes."""
    return tuple(STRATEGIES)


def plan(
    document_lengths: Iterable[int] | np.ndarray,
    world_size: int,
    strategy: str = "flashcp",
    *,
    masks: Mask | Sequence[Mask] | None = None,
    layers: Iterable[tuple[Mask, int]] | None = None,
    **options: object,
) -> ShardingPlan:
    """Decide which rank holds which rows of one pack.

    document_lengths: tokens of each document of the pack, in pack order. world_size: ranks.
    masks: a `flashcp.Mask` for all documents, or one each; causal by default. layers: the model's mix, for masks that a
    layer narrows: [(mask, how many layers have it), ...]; then the sum of all layers' work is what is balanced.
    options: keyword options of the strategy. Ranks differ by at most one row, whatever the strategy; some have none
    of a pack with fewer tokens than ranks.
    Raises ValueError for lengths below 1, no documents, unknown names, and masks that do not fit.
    """
    lengths = read_document_lengths(document_lengths)
    read_world_size(world_size)
    return plan_workload(read_workload(lengths, masks, layers), world_size, strategy, **options)


def plan_workload(workload: Workload, world_size: int, strategy: str = "flashcp", **options: object) -> ShardingPlan:
    """As `plan`, for masks and layers that were read before."""
    lengths = workload.masks.length
    ranks = read_world_size(world_size)
    check_choice("strategy", strategy, STRATEGIES)
    function = STRATEGIES[strategy]
    taken = list(inspect.signature(function).parameters)[2:]
    legal = [name for name in taken if name != "workload"]
    for name in options:
        if name not in legal:
            expected = ", ".join(legal) or "no options"
            raise ValueError(f"option {shown(name)} of strategy {strategy!r}: expected {expected}")
    if "workload" in taken:
        options["workload"] = workload
    return ShardingPlan(lengths, ranks, function(lengths, ranks, **options), strategy, workload=workload)
