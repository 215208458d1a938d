"""`exact`: every row goes to the ranks that read it and to no other.

Row x of a document is read by a rank iff the rank's last piece of that document ends beyond x: only ends cost.
Shards are disjoint, so another rank's shard lies wholly below that end or wholly above it: shards travel whole.
The receive buffer holds the rows of rank 0, then those of rank 1, and so on, each in pack order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flashcp.sharding.assignment import Assignment
from flashcp.sharding.documents import expand_ranges, sum_by
from flashcp.sharding.route import Route
from flashcp.sharding.shards import Segments, ShardTable

__all__ = ["Exact", "traffic"]


class Ends(NamedTuple):
    """Where each rank's last piece of each cut document ends: int64 arrays sorted by document, then end."""

    document: np.ndarray
    rank: np.ndarray
    stop: np.ndarray


class Exact(Route):
    """See the module."""

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
