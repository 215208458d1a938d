"""How KV travels, as arithmetic: for each exchange the rows every rank sends and receives, and where they land.

An exchange is one `Route`, listed once in `EXCHANGES`. `comm/exchanges` moves the rows; nothing here imports torch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flashcp.sharding.assignment import Assignment
from flashcp.sharding.documents import expand_ranges, sum_by
from flashcp.sharding.holders import inner_roundings, members_heads
from flashcp.sharding.route import Route
from flashcp.sharding.shards import Segments, ShardTable


class Ends(NamedTuple):
    """Where each rank's last piece of each cut document ends: int64 arrays sorted by document, then end."""

    document: np.ndarray
    rank: np.ndarray
    stop: np.ndarray


class Exact(Route):
    """Every row goes to the ranks that read it and to no other.

    Row x of a document is read by a rank iff the rank's last piece of that document ends beyond x: only ends cost.
    Shards are disjoint, so another rank's shard lies wholly below that end or wholly above it: shards travel whole.
    The receive buffer holds the rows of rank 0, then those of rank 1, and so on, each in pack order.
    """

    exchange = "exact"

    def _count(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows sent and received, counted without listing a single pair of ranks."""
        plan, shards = self.plan, _cut_shards(self.plan)
        document, start, stop, rank = shards
        readers = _ends(plan)

        # read(x) = sum over the document's ends e of min(x, e); rows a..b leave read(b) - read(a) - (b - a) times.
        first = np.searchsorted(readers.document, np.arange(len(plan.document_lengths) + 1))
        ends_in_pack = plan.offsets[readers.document] + readers.stop
        paid = np.concatenate(([0], np.cumsum(readers.stop)))

        def read(x: np.ndarray) -> np.ndarray:
            split = np.searchsorted(ends_in_pack, plan.offsets[document] + x, side="right")
            return paid[split] - paid[first[document]] + x * (first[document + 1] - split)

        sent_rows = sum_by(rank, read(stop) - read(start) - shards.rows, plan.world_size)
        received_rows = sum_by(readers.rank, readers.stop, plan.world_size)
        return sent_rows, received_rows - sum_by(rank, shards.rows, plan.world_size)

    def _received(self, rank: int) -> Segments:
        """For each cut document that the rank holds, others' rows below its end."""
        table, mine = self.plan.table, _ends(self.plan)
        held = np.flatnonzero(mine.rank == rank)
        shard, which = _of_documents(table.document, mine.document[held])
        shard = shard[(table.rank[shard] != rank) & (table.start[shard] < mine.stop[held][which])]
        return table.take(shard[np.argsort(table.rank[shard], kind="stable")]).side_by_side()

    def sent(self, rank: int) -> Segments:
        """Reader by reader, each reader's in the order of its receive buffer."""
        local, readers = self.plan.local(rank), _ends(self.plan)
        reader, shard = _reads(readers, local)
        order = np.lexsort((shard, readers.rank[reader]))
        return local.take(shard[order])._replace(rank=readers.rank[reader[order]])


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
    roundings = 2  # a sum that goes round is rounded at every hop

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
    roundings = 0

    def _own_and_others(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of single heads, times N, that leave each rank and that come for one tensor, int64."""
        return self.plan.tokens * (self.plan.world_size - 1), self.plan.offsets[-1] - self.plan.tokens

    def _count(self) -> tuple[np.ndarray, np.ndarray]:
        own, others = self._own_and_others()
        ranks = self.plan.world_size
        return (3 * own + others) / (2 * ranks), (3 * others + own) / (2 * ranks)

    def _received(self, rank: int) -> Segments:
        return self.plan.table.take(np.argsort(self.plan.table.rank, kind="stable")).side_by_side()

    def _roundings(self, kv_heads: int) -> int:
        return inner_roundings(self.plan.world_size, kv_heads)

    def _head_rows(self, query_heads: int, kv_heads: int, backward: bool) -> tuple[np.ndarray, np.ndarray]:
        query_heads, kv_heads = members_heads(query_heads, kv_heads, self.plan.world_size)
        own, others = self._own_and_others()
        inward, outward = (others, own) if backward else (own, others)
        return (inward + outward) * query_heads, inward * (2 * kv_heads)


EXCHANGES: dict[str, type[Route]] = {route.exchange: route for route in (Exact, Compacted, AllGather, Ring, Ulysses)}


def traffic(plan: Assignment) -> np.ndarray:
    """Rows that go from each rank (first axis) to each other (second axis), int64 [world_size, world_size]."""
    shards, readers = _cut_shards(plan), _ends(plan)
    reader, shard = _reads(readers, shards)
    pair = shards.rank[shard] * plan.world_size + readers.rank[reader]
    return sum_by(pair, shards.rows[shard], plan.world_size**2).reshape(plan.world_size, plan.world_size)


def _cut_shards(plan: Assignment) -> ShardTable:
    """The shards of documents that have more than one: the only ones with anything to send."""
    return plan.table.take((np.bincount(plan.table.document) > 1)[plan.table.document])


def _ends(plan: Assignment) -> Ends:
    document, _, stop, rank = _cut_shards(plan)
    # Shards lie by document and start: the last one of a document and rank is where that rank's pieces end.
    holder = document * plan.world_size + rank
    order = np.argsort(holder, kind="stable")
    last = np.append(holder[order[1:]] != holder[order[:-1]], True)[: len(order)]
    chosen = np.sort(order[last])
    return Ends(document[chosen], rank[chosen], stop[chosen])


def _reads(readers: Ends, shards: ShardTable | Segments) -> tuple[np.ndarray, np.ndarray]:
    """Who reads which shard: an index into readers and one into shards, for every pair of them."""
    reader, shard = _of_documents(readers.document, shards.document)
    reads = (readers.rank[reader] != shards.rank[shard]) & (readers.stop[reader] > shards.start[shard])
    return reader[reads], shard[reads]


def _of_documents(sorted_documents: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every place of every wanted document, and for each which of the wanted it is."""
    first = np.searchsorted(sorted_documents, wanted)
    count = np.searchsorted(sorted_documents, wanted, side="right") - first
    return expand_ranges(first, count), np.repeat(np.arange(len(wanted)), count)
