"""`compacted`, the paper's sharding-aware exchange: every rank's non-last rows, padded, to everybody.

The last shard of a document is read by nobody else. The other shards of a rank are compacted into one block,
padded to the largest rank's, and all-gathered: rank r's block begins at buffer row r * block.
"""

from __future__ import annotations

import numpy as np

from flashcp.sharding.assignment import Assignment
from flashcp.sharding.shards import Segments

__all__ = ["block_rows", "received", "rows", "sent"]


def travels(plan: Assignment) -> np.ndarray:
    """Which shards leave their rank: all but the last of each document, bool [shards]."""
    return plan.table.stop < plan.document_lengths[plan.table.document]


def block_rows(plan: Assignment) -> int:
    """Rows of one rank's padded block: the most non-last rows on a rank."""
    return int(_travelling_rows(plan, travels(plan)).max())


def rows(plan: Assignment) -> tuple[np.ndarray, np.ndarray]:
    """Rows sent and received per rank, int64: N - 1 padded blocks each way."""
    moved = np.full(plan.world_size, (plan.world_size - 1) * block_rows(plan), dtype=np.int64)
    return moved, moved


def received(plan: Assignment, rank: int) -> Segments:
    """What lies in the receive buffer of a rank: the travelling shards of all others, block by block."""
    return gathered(plan, rank, travels(plan), block_rows(plan))


def sent(plan: Assignment, rank: int) -> Segments:
    """The local rows of a rank that leave, once: the all-gather copies them. `rank` is the rank itself."""
    local = plan.local(rank)
    return local.take(local.stop < plan.document_lengths[local.document])


def gathered(plan: Assignment, rank: int, travelling: np.ndarray, block: int) -> Segments:
    """Segments of an all-gather of the shards that travel, in blocks of `block` rows."""
    shard = np.flatnonzero(travelling)
    shard = shard[np.argsort(plan.table.rank[shard], kind="stable")]
    document, start, stop, owner = (column[shard] for column in plan.table)
    count = stop - start
    before = np.cumsum(count) - count
    opens = np.searchsorted(owner, np.arange(plan.world_size))
    first = np.concatenate((before, [count.sum()]))[opens]
    segments = Segments(document, start, stop, owner, owner * block + before - first[owner])
    return segments.take(owner != rank)


def _travelling_rows(plan: Assignment, travelling: np.ndarray) -> np.ndarray:
    total = np.zeros(plan.world_size, dtype=np.int64)
    np.add.at(total, plan.table.rank[travelling], (plan.table.stop - plan.table.start)[travelling])
    return total
