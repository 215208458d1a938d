"""`exact`: every row goes to the ranks that read it and to no other.

Row x of a document is read by a rank iff the rank's last piece of that document ends beyond x: only ends cost.
Shards are disjoint, so another rank's shard lies wholly below that end or wholly above it: shards travel whole.
The receive buffer holds the rows of rank 0, then those of rank 1, and so on, each in pack order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flashcp.sharding.assignment import Assignment
from flashcp.sharding.documents import expand_ranges
from flashcp.sharding.shards import Segments

__all__ = ["received", "rows", "sent", "traffic"]


class Ends(NamedTuple):
    """Where each rank's last piece of each cut document ends: int64 arrays sorted by document, then end."""

    document: np.ndarray
    rank: np.ndarray
    stop: np.ndarray


def cut_documents(plan: Assignment) -> np.ndarray:
    """Which documents have more than one shard, bool [documents]: the only ones with anything to send."""
    return np.bincount(plan.table.document, minlength=len(plan.document_lengths)) > 1


def ends(plan: Assignment) -> Ends:
    """The ends of every cut document of a plan."""
    cut = cut_documents(plan)[plan.table.document]
    document, _, stop, rank = (column[cut] for column in plan.table)
    # Shards lie by document and start: the last one of a document and rank is where that rank's pieces end.
    holder = document * plan.world_size + rank
    order = np.argsort(holder, kind="stable")
    last = np.append(holder[order[1:]] != holder[order[:-1]], True)[: len(order)]
    chosen = np.sort(order[last])
    return Ends(document[chosen], rank[chosen], stop[chosen])


def rows(plan: Assignment) -> tuple[np.ndarray, np.ndarray]:
    """Rows sent and received per rank, int64, counted without listing a single pair of ranks."""
    cut = cut_documents(plan)[plan.table.document]
    document, start, stop, rank = (column[cut] for column in plan.table)
    readers = ends(plan)

    # read(x) = sum over the document's ends e of min(x, e); rows a..b leave read(b) - read(a) - (b - a) times.
    first = np.searchsorted(readers.document, np.arange(len(plan.document_lengths) + 1))
    ends_in_pack = plan.offsets[readers.document] + readers.stop
    paid = np.concatenate(([0], np.cumsum(readers.stop)))

    def read(x: np.ndarray) -> np.ndarray:
        split = np.searchsorted(ends_in_pack, plan.offsets[document] + x, side="right")
        return paid[split] - paid[first[document]] + x * (first[document + 1] - split)

    sent_rows = np.zeros(plan.world_size, dtype=np.int64)
    np.add.at(sent_rows, rank, read(stop) - read(start) - (stop - start))
    received_rows = np.zeros(plan.world_size, dtype=np.int64)
    np.add.at(received_rows, readers.rank, readers.stop)
    np.subtract.at(received_rows, rank, stop - start)
    return sent_rows, received_rows


def received(plan: Assignment, rank: int) -> Segments:
    """What lies in the receive buffer of a rank: for each cut document it holds, others' rows below its end."""
    mine = ends(plan)
    held = mine.rank == rank
    document, end = mine.document[held], mine.stop[held]
    first = np.searchsorted(plan.table.document, document)
    count = np.searchsorted(plan.table.document, document, side="right") - first
    shard = expand_ranges(first, count)
    end = np.repeat(end, count)
    keep = (plan.table.rank[shard] != rank) & (plan.table.start[shard] < end)
    shard = shard[keep]
    shard = shard[np.argsort(plan.table.rank[shard], kind="stable")]
    document, start, stop, owner = (column[shard] for column in plan.table)
    count = stop - start
    return Segments(document, start, stop, owner, np.cumsum(count) - count)


def sent(plan: Assignment, rank: int) -> Segments:
    """Which local rows of a rank leave, reader by reader: each reader's in the order of its receive buffer."""
    local, readers = plan.local(rank), ends(plan)
    first = np.searchsorted(readers.document, local.document)
    count = np.searchsorted(readers.document, local.document, side="right") - first
    reader = expand_ranges(first, count)
    shard = np.repeat(np.arange(len(local.document)), count)
    keep = (readers.rank[reader] != rank) & (readers.stop[reader] > local.start[shard])
    reader, shard = reader[keep], shard[keep]
    order = np.lexsort((shard, readers.rank[reader]))
    reader, shard = reader[order], shard[order]
    return local.take(shard)._replace(rank=readers.rank[reader])


def traffic(plan: Assignment) -> np.ndarray:
    """Rows that go from each rank (first axis) to each other (second axis), int64 [world_size, world_size]."""
    cut = cut_documents(plan)[plan.table.document]
    document, start, stop, rank = (column[cut] for column in plan.table)
    readers = ends(plan)
    first = np.searchsorted(readers.document, document)
    count = np.searchsorted(readers.document, document, side="right") - first
    reader, shard = expand_ranges(first, count), np.repeat(np.arange(len(document)), count)
    reads = (readers.rank[reader] != rank[shard]) & (readers.stop[reader] > start[shard])
    reader, shard = reader[reads], shard[reads]
    pair = rank[shard] * plan.world_size + readers.rank[reader]
    rows_of_pair = np.bincount(pair, (stop - start)[shard], plan.world_size**2)
    return rows_of_pair.astype(np.int64).reshape(plan.world_size, plan.world_size)
