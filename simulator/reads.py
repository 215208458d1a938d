"""Who reads how many rows from whom: the plan as the cost model sees it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flashcp.sharding.plan import ShardingPlan

__all__ = ["Reads", "plan_reads"]


class Reads(NamedTuple):
    """Per shard [S], in the plan's order, what its queries read of the document before it, by owner [S, N].

    rank, start, rows: int64 [S]. before: rows that each rank holds of the shard's document before the shard.
    ranges: how many shards those are. last: which shards are their rank's last of their document, bool [S].
    """

    rank: np.ndarray
    start: np.ndarray
    rows: np.ndarray
    before: np.ndarray
    ranges: np.ndarray
    last: np.ndarray

    @property
    def traffic(self) -> np.ndarray:
        """Rows that the exact exchange carries from source to destination, int64 [N, N], nothing on the diagonal."""
        ranks = self.before.shape[1]
        moved = np.zeros((ranks, ranks), dtype=np.int64)
        np.add.at(moved, self.rank[self.last], self.before[self.last])
        np.fill_diagonal(moved, 0)
        return moved.T


def plan_reads(plan: ShardingPlan) -> Reads:
    """The reads of every shard of a plan; memory and time grow with shards x ranks."""
    document, start, stop, rank = plan.table
    shards, ranks = len(rank), plan.world_size
    rows = stop - start
    every = np.arange(shards)
    held = np.zeros((shards + 1, ranks), dtype=np.int64)
    count = np.zeros((shards + 1, ranks), dtype=np.int64)
    held[every + 1, rank] = rows
    count[every + 1, rank] = 1
    np.cumsum(held, axis=0, out=held)
    np.cumsum(count, axis=0, out=count)
    first = np.searchsorted(document, document)
    latest = np.zeros(len(plan.document_lengths) * ranks, dtype=np.int64)
    latest[document * ranks + rank] = every  # of equal indices the last one stays
    last = np.zeros(shards, dtype=bool)
    last[latest[document * ranks + rank]] = True
    return Reads(rank, start, rows, held[:-1] - held[first], count[:-1] - count[first], last)
