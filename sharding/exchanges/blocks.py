"""Exchanges that move all of a rank's rows, or all that anybody might read, to everybody."""

from __future__ import annotations

import numpy as np

from flashcp.sharding.documents import sum_by
from flashcp.sharding.route import Route
from flashcp.sharding.shards import Segments

__all__ = ["AllGather", "Compacted", "Ring", "Ulysses"]


class AllGather(Route):
    """Llama 3's exchange: every KV row to every rank, whether anybody reads it or not.

    Blocks are padded to the largest rank's rows (one row at most for the strategies here): rank r's begins at buffer
    row r * block.
    """

    exchange = "all_gather"

    def travels(self, document: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Which shards leave their rank, bool [shards]."""
        return np.full(len(document), True)

    def _count(self) -> tuple[np.ndarray, np.ndarray]:
        ranks = self.plan.world_size
        moved = np.full(ranks, (ranks - 1) * self.block_rows, dtype=np.int64)
        return moved, moved

    def _received(self, rank: int) -> Segments:
        table, ranks = self.plan.table, self.plan.world_size
        leaving = table.take(self.travels(table.document, table.stop))
        blocks = leaving.take(np.argsort(leaving.rank, kind="stable")).side_by_side()
        padding = self.block_rows - sum_by(leaving.rank, leaving.rows, ranks)
        before = np.cumsum(padding) - padding
        return blocks._replace(row=blocks.row + before[blocks.rank]).take(blocks.rank != rank)


class Compacted(AllGather):
    """The paper's sharding-aware exchange: every rank's non-last rows, compacted into a padded block, to everybody.

    The last shard of a document is read by nobody else.
    """

    exchange = "compacted"

    def travels(self, document: np.ndarray, stop: np.ndarray) -> np.ndarray:
        return stop < self.plan.document_lengths[document]

    @property
    def block_rows(self) -> int:
        table = self.plan.table
        leaving = table.take(self.travels(table.document, table.stop))
        return int(sum_by(leaving.rank, leaving.rows, self.plan.world_size).max())

    def sent(self, rank: int) -> Segments:
        local = self.plan.local(rank)
        return local.take(self.travels(local.document, local.stop))


class Ring(Route):
    """Blocks of KV go round, each rank hands on what it received (ring attention; ring-flash-attention).

    At step k = 1 .. N-1 a rank receives the block of rank r - k from its neighbour r - 1. Blocks are as long as their
    owner's rows: nothing is padded. The receive buffer holds the blocks in order of arrival.
    """

    exchange = "ring"

    def _count(self) -> tuple[np.ndarray, np.ndarray]:
        """Every block but the next rank's goes out, all others' come in."""
        others = self.plan.offsets[-1] - self.plan.tokens
        return np.roll(others, -1), others

    def _received(self, rank: int) -> Segments:
        step = (rank - self.plan.table.rank) % self.plan.world_size
        order = np.argsort(step, kind="stable")
        return self.plan.table.take(order[step[order] > 0]).side_by_side()


class Ulysses(Route):
    """Q, K and V change from split by tokens to split by heads, O changes back (DeepSpeed-Ulysses).

    Each rank then holds every row of the pack for 1/N of the heads, its own too, the rows of rank 0 first; so any plan
    is balanced. Counted as KV rows of the same bytes when query and KV heads are equally many: Q, K, V and O are half a
    KV row each, and of each a rank sends the heads of the N - 1 others, so 2 T (N - 1) / N rows leave and as many
    arrive. A head is a fraction of a row: rows are float64.
    """

    exchange = "ulysses"
    imbalance = 1.0

    def _own_and_others(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of single heads, times N, that leave each rank and that come for one tensor, int64."""
        return self.plan.tokens * (self.plan.world_size - 1), self.plan.offsets[-1] - self.plan.tokens

    def _count(self) -> tuple[np.ndarray, np.ndarray]:
        own, others = self._own_and_others()
        ranks = self.plan.world_size
        return (3 * own + others) / (2 * ranks), (3 * others + own) / (2 * ranks)

    def _received(self, rank: int) -> Segments:
        return self.plan.table.take(np.argsort(self.plan.table.rank, kind="stable")).side_by_side()

    def _head_rows(self, query_heads: int, kv_heads: int, backward: bool) -> np.ndarray:
        ranks = self.plan.world_size
        if query_heads % ranks or kv_heads % ranks:
            raise ValueError(
                f"query_heads={query_heads}, kv_heads={kv_heads}: ulysses expects multiples of world_size={ranks}"
            )
        own, others = self._own_and_others()
        inward, outward = (others, own) if backward else (own, others)
        return (inward * (query_heads + 2 * kv_heads) + outward * query_heads) // ranks
