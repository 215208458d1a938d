"""How many bytes of K and V, and of their gradients, leave each node of a cluster: what the routes say.

Over gloo, whose sends, receives and all-to-all go straight from rank to rank, and whose all-gather goes round: every
rank hands N - 1 blocks to the next one. Headers of messages are not counted.
"""

from __future__ import annotations

import numpy as np

from flashcp.experiments.lab.cases import Work
from flashcp.sharding.exchanges import EXCHANGES, traffic
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.route import wire_bytes
from flashcp.simulator.cost import AttentionShape
from flashcp.simulator.members import member_shape


def crossing_bytes(work: Work, shape: AttentionShape, ranks_per_node: int) -> np.ndarray:
    """Bytes that leave each node while one attention runs forward and backward, float64 [nodes].

    Consecutive ranks share a node, and so do those of a holder: each of them moves its share of the heads. Raises
    ValueError where ranks do not fill nodes, nor holders them.
    """
    plan, heads = work.plan, work.head_ranks
    if work.ranks % ranks_per_node or ranks_per_node % heads:
        raise ValueError(
            f"world_size={work.ranks} with head_ranks={heads}: expected a multiple of ranks_per_node={ranks_per_node}, "
            "and a divisor of it"
        )
    moved = heads * moved_bytes(plan, work.exchange, member_shape(shape, heads))
    node = np.arange(plan.world_size) * heads // ranks_per_node
    between = np.where(node[:, None] != node[None, :], moved, 0.0)
    return np.bincount(node, between.sum(axis=1))


def moved_bytes(plan: ShardingPlan, exchange: str, shape: AttentionShape) -> np.ndarray:
    """Bytes from rank to rank, both passes together, float64 [source, destination]."""
    back = shape._replace(dtype_bytes=wire_bytes(shape.dtype_bytes, "auto", EXCHANGES[exchange].roundings))
    ranks, others = plan.world_size, ~np.eye(plan.world_size, dtype=bool)
    following = np.roll(np.eye(ranks), 1, axis=1)
    if exchange == "ulysses":
        member = member_shape(shape, ranks)
        there = plan.tokens[:, None] * (member.query_bytes / 2 + member.kv_bytes) * others  # Q, K and V
        home = plan.tokens[None, :] * (member.query_bytes / 2) * others
        return 2.0 * (there + home)  # the backward's are the mirror: of O one way, of Q, K and V the other
    if exchange == "ring":
        route = plan.route(exchange)
        return following * (route.sent_rows * shape.kv_bytes + route.received_rows * back.kv_bytes)[:, None]
    if exchange == "exact":
        rows = traffic(plan)
        return rows * float(shape.kv_bytes) + rows.T * float(back.kv_bytes)
    block = plan.route(exchange).block_rows
    return block * ((ranks - 1) * shape.kv_bytes * following + back.kv_bytes * others)
