"""Holders: h ranks that together hold the rows which a plan assigns to one of its ranks, and share out its heads.

A rank of a holder has an even share of its rows, except inside attention: there it has all of them, for its share of
the heads. With h = 1 a holder is a rank. A plan knows nothing of this: it is made for `world_size / h` holders.
"""

from __future__ import annotations

import numpy as np

from flashcp.sharding.assignment import Assignment
from flashcp.sharding.route import Route, gathered_rows, wire_bytes


def members_rows(rows: int, head_ranks: int) -> np.ndarray:
    """How many of a holder's rows each of its ranks has, in the holder's order, int64 [head_ranks]; they differ by at
    most one."""
    return np.diff(np.arange(head_ranks + 1, dtype=np.int64) * rows // head_ranks)


def rows_of_rank(plan: Assignment, rank: int, head_ranks: int = 1) -> np.ndarray:
    """Row of the pack of every row of a rank, in local order, int64 [rank's tokens].

    rank: among all, 0 to plan.world_size * head_ranks - 1; those of a holder follow each other.
    """
    return _share(plan.rows(rank // head_ranks), rank, head_ranks)


def positions_of_rank(plan: Assignment, rank: int, head_ranks: int = 1) -> np.ndarray:
    """Position inside its document of every row of a rank, int64 [rank's tokens]."""
    return _share(plan.positions(rank // head_ranks), rank, head_ranks)


def can_share_heads(query_heads: int, kv_heads: int, head_ranks: int) -> bool:
    """Whether so many ranks can share out the heads as `members_heads` does."""
    return not (query_heads % head_ranks or (kv_heads % head_ranks and head_ranks % kv_heads))


def members_heads(query_heads: int, kv_heads: int, head_ranks: int) -> tuple[int, int]:
    """Query and KV heads on which one rank of a holder computes; under `ulysses` all ranks are one.

    head_ranks divides the query heads. It divides the KV heads too, or they divide it: then several ranks share a KV
    head, and each is sent it. Raises ValueError otherwise.
    """
    if not can_share_heads(query_heads, kv_heads, head_ranks):
        raise ValueError(
            f"query_heads={query_heads}, kv_heads={kv_heads}: cannot be shared out among {head_ranks} ranks; expected "
            f"multiples of {head_ranks}, or KV heads that divide {head_ranks}"
        )
    return query_heads // head_ranks, max(1, kv_heads // head_ranks)


def inner_roundings(head_ranks: int, kv_heads: int) -> int:
    """Of gradients of K and V inside a holder (`flashcp.sharding.route.is_fp32`): where several ranks have one KV head,
    each of them sends a sum, of which parts were rounded on their way to it."""
    return 2 if head_ranks > kv_heads else 0


def rows_between_and_inside(route: Route, head_ranks: int, share: float) -> tuple[float, float]:
    """Critical rows and saving of all ranks: a rank's heads of the rows that its holder exchanges, and the all-to-alls
    inside the holder, counted as `ulysses` counts.

    route: between holders. share: of the KV heads that a rank has.
    """
    if head_ranks == 1:
        return route.critical_rows, route.saving
    tokens, holders = int(route.plan.offsets[-1]), route.plan.world_size
    swapped = 2 * (head_ranks - 1) * -(-int(route.plan.tokens.max()) // head_ranks) / head_ranks
    critical, ranks = route.critical_rows * share + swapped, holders * head_ranks
    return critical, 1.0 - critical / gathered_rows(tokens, ranks)


def bytes_inside(
    plan: Assignment,
    head_ranks: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype_bytes: int,
    backward: bool = False,
    gradient_wire: str = "model",
) -> np.ndarray:
    """Bytes that leave each rank for the others of its holder, int64 [plan.world_size * head_ranks].

    Forward: Q, K and V become heads and the output becomes rows. backward=True: the gradient of the output becomes
    heads, those of Q, K and V become rows, K's and V's as gradient_wire says where they are added up (`wire_bytes`,
    `inner_roundings`). What travels between holders is the route's, for `members_heads`.
    Raises ValueError for heads that cannot be shared out.
    """
    query, kv = members_heads(query_heads, kv_heads, head_ranks)
    rows = np.stack([members_rows(tokens, head_ranks) for tokens in plan.tokens.tolist()])  # [holders, head_ranks]
    others = rows.sum(axis=1, keepdims=True) - rows
    of_kv = wire_bytes(dtype_bytes, gradient_wire, inner_roundings(head_ranks, kv_heads)) if backward else dtype_bytes
    alone, beside = query * dtype_bytes, query * dtype_bytes + 2 * kv * of_kv  # the queries' tensor, and with K and V
    to_heads, to_rows = (alone, beside) if backward else (beside, alone)
    return (rows * ((head_ranks - 1) * to_heads) + others * to_rows).ravel() * head_dim


def _share(rows: np.ndarray, rank: int, head_ranks: int) -> np.ndarray:
    place = rank % head_ranks
    return rows[len(rows) * place // head_ranks : len(rows) * (place + 1) // head_ranks]
