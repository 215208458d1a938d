"""`ulysses` (DeepSpeed-Ulysses): Q, K and V change from split by tokens to split by heads, O changes back.

Each rank then holds every row of the pack for 1/N of the heads, so any plan is balanced. Counted as KV rows of the
same bytes when query and KV heads are equally many: Q, K, V and O are half a KV row each, and of each a rank sends
the heads of the N - 1 others, so 2 T (N - 1) / N rows leave and as many arrive.
"""

from __future__ import annotations

import numpy as np

from flashcp.sharding.assignment import Assignment
from flashcp.sharding.shards import Segments

__all__ = ["received", "rows", "sent"]


def rows(plan: Assignment) -> tuple[np.ndarray, np.ndarray]:
    """Rows sent and received per rank, float64 (a head is a fraction of a row)."""
    ranks, others = plan.world_size, plan.offsets[-1] - plan.tokens
    own = plan.tokens * (ranks - 1)
    return (3 * own + others) / (2 * ranks), (3 * others + own) / (2 * ranks)


def received(plan: Assignment, rank: int) -> Segments:
    """What a rank computes on: every shard of the pack, its own too, the rows of rank 0 first, then rank 1's."""
    shard = np.argsort(plan.table.rank, kind="stable")
    document, start, stop, owner = (column[shard] for column in plan.table)
    count = stop - start
    return Segments(document, start, stop, owner, np.cumsum(count) - count)


def sent(plan: Assignment, rank: int) -> Segments:
    """The local rows of a rank that leave, once: all of them, each rank taking its heads."""
    return plan.local(rank)
