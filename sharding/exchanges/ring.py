"""`ring`: blocks of KV go round, each rank hands on what it received (ring attention; ring-flash-attention).

At step k = 1 .. N-1 a rank receives the block of rank r - k from its neighbour r - 1. Blocks are as long as their
owner's rows: nothing is padded. The receive buffer holds the blocks in order of arrival.
"""

from __future__ import annotations

import numpy as np

from flashcp.sharding.assignment import Assignment
from flashcp.sharding.shards import Segments

__all__ = ["received", "rows", "sent"]


def rows(plan: Assignment) -> tuple[np.ndarray, np.ndarray]:
    """Rows sent and received per rank, int64: every block but the next rank's goes out, all others' come in."""
    total = plan.offsets[-1]
    if plan.world_size == 1:
        return np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    return total - np.roll(plan.tokens, -1), total - plan.tokens


def received(plan: Assignment, rank: int) -> Segments:
    """What lies in the receive buffer of a rank: the block of rank - 1, then that of rank - 2, and so on."""
    step = (rank - plan.table.rank) % plan.world_size
    shard = np.flatnonzero(step > 0)
    shard = shard[np.argsort(step[shard], kind="stable")]
    document, start, stop, owner = (column[shard] for column in plan.table)
    count = stop - start
    return Segments(document, start, stop, owner, np.cumsum(count) - count)


def sent(plan: Assignment, rank: int) -> Segments:
    """The local rows of a rank that go round: all of them, once. `rank` is the rank itself."""
    return plan.local(rank)
