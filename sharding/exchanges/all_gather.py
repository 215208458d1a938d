"""`all_gather`, Llama 3's exchange: every KV row to every rank, whether anybody reads it or not.

Blocks are padded to the largest rank's rows (one row at most for the strategies here).
"""

from __future__ import annotations

import numpy as np

from flashcp.sharding.assignment import Assignment
from flashcp.sharding.exchanges.compacted import gathered
from flashcp.sharding.shards import Segments

__all__ = ["block_rows", "received", "rows", "sent"]


def block_rows(plan: Assignment) -> int:
    """Rows of one rank's padded block: the most rows on a rank."""
    return int(plan.tokens.max())


def rows(plan: Assignment) -> tuple[np.ndarray, np.ndarray]:
    """Rows sent and received per rank, int64: N - 1 padded blocks each way."""
    moved = np.full(plan.world_size, (plan.world_size - 1) * block_rows(plan), dtype=np.int64)
    return moved, moved


def received(plan: Assignment, rank: int) -> Segments:
    """What lies in the receive buffer of a rank: all shards of all others, block by block."""
    return gathered(plan, rank, np.full(len(plan.table.rank), True), block_rows(plan))


def sent(plan: Assignment, rank: int) -> Segments:
    """The local rows of a rank that leave: all of them, once. `rank` is the rank itself."""
    return plan.local(rank)
