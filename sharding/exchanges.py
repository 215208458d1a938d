"""How KV travels, as arithmetic: for each exchange the rows every rank sends and receives, and where they land.

An exchange is one `Route`, listed once in `EXCHANGES`. `comm/exchanges` moves the rows; nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from flashcp.sharding.assignment import Assignment
from flashcp.sharding.documents import expand_ranges, sum_by
from flashcp.sharding.holders import inner_roundings, members_heads
from flashcp.sharding.masks import Workload
from flashcp.sharding.route import Route
from flashcp.sharding.shards import Segments, ShardTable


class Reads(NamedTuple):
    """The rows of cut documents that each rank reads: disjoint intervals, int64 arrays sorted by document, then end."""

    document: np.ndarray
    rank: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def take(self, index: np.ndarray) -> Reads:
        return Reads(*(column[index] for column in self))


class Exact(Route):
    """Every row goes to the ranks that read it and to no other.

    A rank's pieces of a document read one or more intervals of it; of a causal one, all below the rank's last end: only
    ends cost. Other ranks' shards travel as far as they lie inside.
    The receive buffer holds the rows of rank 0, then those of rank 1, and so on, each in pack order.
    """

    exchange = "exact"

    def _count(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows sent and received, counted without listing a single pair of ranks."""
        plan, shards, reads = self.plan, _cut_shards(self.plan), _reads(self.plan)
        sent_rows = sum_by(shards.rank, _readers(plan, reads, shards) - shards.rows, plan.world_size)
        received_rows = sum_by(reads.rank, reads.stop - reads.start, plan.world_size)
        return sent_rows, received_rows - sum_by(shards.rank, shards.rows, plan.world_size)

    def _received(self, rank: int) -> Segments:
        """For each cut document that the rank holds, others' rows that it reads."""
        table, reads = self.plan.table, _reads(self.plan)
        mine = reads.take(np.flatnonzero(reads.rank == rank))
        shard, which = _of_documents(table.document, mine.document)
        start, stop = _overlap(table, shard, mine, which)
        chosen = np.flatnonzero((table.rank[shard] != rank) & (start < stop))
        chosen = chosen[np.argsort(table.rank[shard[chosen]], kind="stable")]
        shard = shard[chosen]
        return ShardTable(table.document[shard], start[chosen], stop[chosen], table.rank[shard]).side_by_side()

    def sent(self, rank: int) -> Segments:
        """Reader by reader, each reader's in the order of its receive buffer."""
        local, reads = self.plan.local(rank), _reads(self.plan)
        reader, shard, start, stop = _pairs(reads, local)
        order = np.lexsort((shard, reads.rank[reader]))
        reader, shard, start, stop = reader[order], shard[order], start[order], stop[order]
        row = local.row[shard] + start - local.start[shard]
        return Segments(local.document[shard], start, stop, reads.rank[reader], row)


class AllGather(Route):
    """Llama 3's exchange: every KV row to every rank, whether anybody reads it or not.

    Blocks are padded to the largest rank's rows (one row at most for the strategies here): rank r's begins at buffer
    row r * block.
    """

    exchange = "all_gather"

    def travels(self) -> np.ndarray:
        """Which shards of the plan leave their rank, bool [shards]."""
        return np.full(len(self.plan.table.document), True)

    def _count(self) -> tuple[np.ndarray, np.ndarray]:
        ranks = self.plan.world_size
        moved = np.full(ranks, (ranks - 1) * self.block_rows, dtype=np.int64)
        return moved, moved

    def _received(self, rank: int) -> Segments:
        table, ranks = self.plan.table, self.plan.world_size
        leaving = table.take(self.travels())
        blocks = leaving.take(np.argsort(leaving.rank, kind="stable")).side_by_side()
        padding = self.block_rows - sum_by(leaving.rank, leaving.rows, ranks)
        before = np.cumsum(padding) - padding
        return blocks._replace(row=blocks.row + before[blocks.rank]).take(blocks.rank != rank)


class Compacted(AllGather):
    """The paper's sharding-aware exchange: every rank's shards that others read, compacted into a padded block, to
    everybody.

    The paper says every rank's non-last rows: of a causal document the last shard is read by nobody else, the others
    are.
    """

    exchange = "compacted"

    def travels(self) -> np.ndarray:
        table = self.plan.table
        if self.plan.masks.is_causal:
            return table.stop < self.plan.document_lengths[table.document]
        return _readers(self.plan, _reads(self.plan), table) > table.rows

    @property
    def block_rows(self) -> int:
        table = self.plan.table
        leaving = table.take(self.travels())
        return int(sum_by(leaving.rank, leaving.rows, self.plan.world_size).max())

    def sent(self, rank: int) -> Segments:
        return self.plan.local(rank).take(self.travels()[self.plan.table.rank == rank])


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


class LayerRows(NamedTuple):
    """Rows of the exact exchange in all layers of the plan's mix together, int64 [world_size]; and the sum of the
    layers' critical rows: layers take turns, so each waits for its own busiest rank."""

    sent: np.ndarray
    received: np.ndarray
    critical: int


def rows_of_layers(plan: Assignment) -> LayerRows:
    """What a plan moves under the exact exchange, forward; of a plan without a mix, in one layer."""
    routes = []
    for masks, count in plan.workload.kinds:
        same = plan if masks is plan.masks else replace(plan, workload=Workload(masks))
        routes.append((Exact(same), count))
    return LayerRows(
        sum(count * route.sent_rows for route, count in routes),  # type: ignore[arg-type]
        sum(count * route.received_rows for route, count in routes),  # type: ignore[arg-type]
        sum(count * int(route.critical_rows) for route, count in routes),
    )


def traffic(plan: Assignment) -> np.ndarray:
    """Rows that go from each rank (first axis) to each other (second axis), int64 [world_size, world_size]."""
    shards, reads = _cut_shards(plan), _reads(plan)
    reader, shard, start, stop = _pairs(reads, shards)
    pair = shards.rank[shard] * plan.world_size + reads.rank[reader]
    return sum_by(pair, stop - start, plan.world_size**2).reshape(plan.world_size, plan.world_size)


def _cut_shards(plan: Assignment) -> ShardTable:
    """The shards of documents that have more than one: the only ones with anything to send."""
    return plan.table.take((np.bincount(plan.table.document) > 1)[plan.table.document])


def _reads(plan: Assignment) -> Reads:
    document, start, stop, rank = _cut_shards(plan)
    # Shards lie by document and start, and so do, rank by rank, the intervals that they read.
    holder = document * plan.world_size + rank
    order = np.argsort(holder, kind="stable")
    other = np.append(holder[order[1:]] != holder[order[:-1]], True)[: len(order)]
    if plan.masks.is_causal:  # all from the start: one interval
        chosen = np.sort(order[other])
        return Reads(document[chosen], rank[chosen], np.zeros_like(chosen), stop[chosen])
    first, past = plan.masks.lowest(document, start)[order], plan.masks.past(document, stop - 1)[order]
    closes = other.copy()
    closes[:-1] |= first[1:] > past[:-1]
    opens = np.append(True, closes[:-1])[: len(order)]
    last = order[closes]
    place = np.argsort(last, kind="stable")
    return Reads(document[last][place], rank[last][place], first[opens][place], past[closes][place])


def _readers(plan: Assignment, reads: Reads, shards: ShardTable) -> np.ndarray:
    """How often the rows of each shard are read, a rank's own reading counted, int64 [shards]."""
    first = np.searchsorted(reads.document, np.arange(len(plan.document_lengths) + 1))

    def below(x: np.ndarray, edge: np.ndarray) -> np.ndarray:
        """Sum over the edges of the document of min(x, edge)."""
        order = np.argsort(plan.offsets[reads.document] + edge, kind="stable")
        in_pack = (plan.offsets[reads.document] + edge)[order]
        paid = np.concatenate(([0], np.cumsum(edge[order])))
        split = np.searchsorted(in_pack, plan.offsets[shards.document] + x, side="right")
        split = np.clip(split, first[shards.document], first[shards.document + 1])
        return paid[split] - paid[first[shards.document]] + x * (first[shards.document + 1] - split)

    counted = below(shards.stop, reads.stop) - below(shards.start, reads.stop)
    if reads.start.any():
        counted -= below(shards.stop, reads.start) - below(shards.start, reads.start)
    return counted


def _pairs(reads: Reads, shards: ShardTable | Segments) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Who reads which shard: an index into reads and one into shards, for every pair of them, and the rows."""
    reader, shard = _of_documents(reads.document, shards.document)
    start, stop = _overlap(shards, shard, reads, reader)
    there = (reads.rank[reader] != shards.rank[shard]) & (start < stop)
    return reader[there], shard[there], start[there], stop[there]


def _overlap(
    shards: ShardTable | Segments, shard: np.ndarray, reads: Reads, which: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a shard that lie in an interval, pair by pair."""
    return np.maximum(shards.start[shard], reads.start[which]), np.minimum(shards.stop[shard], reads.stop[which])


def _of_documents(sorted_documents: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every place of every wanted document, and for each which of the wanted it is."""
    first = np.searchsorted(sorted_documents, wanted)
    count = np.searchsorted(sorted_documents, wanted, side="right") - first
    return expand_ranges(first, count), np.repeat(np.arange(len(wanted)), count)
