"""`flashcp.predicted_time`: what a plan's attention would take on a cluster, for a planner that chooses by it."""

from __future__ import annotations

from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.holders import members_heads
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.values import check_choice, read_whole
from flashcp.simulation import read_cluster_or_machine
from flashcp.simulator.cost import ModelShape
from flashcp.simulator.machine import Machine
from flashcp.simulator.module import PredictedTime
from flashcp.simulator.variants import MOST_RANKS, Variant, make_setting

CHOOSING = tuple(name for name in EXCHANGES if name != "ulysses")
"""Under `ulysses` every rank attends to all rows, whatever the plan."""


def predicted_time(
    cluster: str | Machine = "h100-nvlink",
    exchange: str = "exact",
    query_heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    *,
    dtype_bytes: int = 2,
    overlap: str = "auto",
    gradient_wire: str = "auto",
    head_ranks: int = 1,
) -> PredictedTime:
    """A function of a plan: milliseconds of an attention layer, forward and backward, as our implementation runs it.

    `flashcp.plan(lengths, 8, cost=flashcp.predicted_time("h100-nvlink"))` is the fastest of the plans that the planner
    compares, as predicted. Nothing is measured. It can be pickled.

    cluster: a name of `conf/cluster/`, or a Machine. query_heads, kv_heads, head_dim, dtype_bytes: of the layer.
    exchange, overlap, gradient_wire, head_ranks: as for `flashcp.ContextParallel`; plans are for its holders.
        `ulysses` is left out: it takes as long under any plan.

    Raises ValueError naming value, field and what is legal.
    """
    if isinstance(cluster, ShardingPlan):
        raise ValueError("cost=flashcp.predicted_time: expected what it returns, flashcp.predicted_time('h100-nvlink')")
    check_choice("exchange", exchange, CHOOSING)
    model = ModelShape(query_heads, kv_heads, head_dim, dtype_bytes)
    setting = make_setting(read_cluster_or_machine(cluster), model, overlap, gradient_wire)
    heads = read_whole("head_ranks", head_ranks, most=MOST_RANKS)
    members_heads(query_heads, kv_heads, heads)
    return PredictedTime(setting, Variant("flashcp", "flashcp", exchange, head_ranks=heads))
