"""Which KV ranges each query shard of a rank reads and where they lie: plain data built from a plan and a route.

A query shard a..b of a causal document reads the rows 0..b of that document: own shards from the local tensor, the
others from the receive buffer. Only the shard itself needs the causal mask; all that lies before it is read in full.
Under other masks (`flashcp.sharding.masks`) each row sees an interval of keys, a range perhaps in part or not at all.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from flashcp.sharding.documents import document_offsets, expand_ranges
from flashcp.sharding.masks import Masks
from flashcp.sharding.shards import Segments


class Seen(NamedTuple):
    """Masks that are not all causal. document: of each query shard, an index into masks, int64 [G]."""

    document: np.ndarray
    masks: Masks


@dataclass(frozen=True, eq=False)
class Schedule:
    """Query shards [G] and the KV ranges [R] they read, ranges of query g at range_first[g] : range_first[g + 1].

    query_start, query_stop: local rows of the shard. query_position: position of its first row in its document.
    received: whether the range lies in the receive buffer (else in the local tensor).
    row_start, row_stop: its rows there. position: position of its first row in the document.
    masked: whether some row of the shard does not see all of it. Of causal documents it is the query shard's own rows.
    source: the rank whose rows they are. All int64 but the two bool arrays; within a query, local ranges come
    first, then the received ones in buffer order.
    seen: what each row sees, where not all documents are causal.
    """

    query_start: np.ndarray
    query_stop: np.ndarray
    query_position: np.ndarray
    range_first: np.ndarray
    received: np.ndarray
    row_start: np.ndarray
    row_stop: np.ndarray
    position: np.ndarray
    masked: np.ndarray
    source: np.ndarray
    seen: Seen | None = None

    @cached_property
    def pairs(self) -> int:
        """Query-key pairs that this schedule computes."""
        if self.seen is not None:
            return self._seen_pairs(*self.seen)
        rows = self.row_stop - self.row_start
        queries = (self.query_stop - self.query_start)[self.query]
        return int(np.where(self.masked, rows * (rows + 1) // 2, rows * queries).sum())

    @cached_property
    def sources(self) -> tuple[int, ...]:
        """Ranks whose rows it reads from the receive buffer."""
        return tuple(np.unique(self.source[self.received]).tolist())

    @cached_property
    def query(self) -> np.ndarray:
        """The query shard that each range belongs to, int32 [R]."""
        return np.repeat(np.arange(len(self.query_start), dtype=np.int32), np.diff(self.range_first))

    @cached_property
    def arrival(self) -> np.ndarray:
        """0 for local ranges, else 1, 2, ... for sources in the order they lie in the receive buffer, int32 [R]."""
        arrival = np.zeros(len(self.source), dtype=np.int32)
        received = np.flatnonzero(self.received)
        source = self.source[received]
        lowest = np.full(int(source.max(initial=0)) + 1, np.iinfo(np.int64).max)
        np.minimum.at(lowest, source, self.row_start[received])
        arrival[received] = 1 + np.argsort(np.argsort(lowest))[source]
        return arrival

    def _seen_pairs(self, document: np.ndarray, masks: Masks) -> int:
        """Range by range: of every row of the shard, how much of the range lies in its interval."""
        length = self.query_stop - self.query_start
        pairs = 0
        for query, start, rows in zip(self.query, self.position, self.row_stop - self.row_start, strict=True):
            row = self.query_position[query] + np.arange(length[query])
            first, past = masks.lowest(document[query], row), masks.past(document[query], row)
            pairs += int(np.maximum(np.minimum(past, start + rows) - np.maximum(first, start), 0).sum())
        return pairs

    def range_totals(self, amount: np.ndarray) -> np.ndarray:
        """Sum over the ranges of each query shard of an amount per range, int64 [G]."""
        totals = np.concatenate(([0], np.cumsum(amount, dtype=np.int64)))
        return totals[self.range_first[1:]] - totals[self.range_first[:-1]]

    def part(self, keep: np.ndarray) -> Schedule:
        """The same query shards with those of their ranges that `keep`, bool [R], marks."""
        first = np.concatenate(([0], np.cumsum(keep)))[self.range_first]
        ranges = {name: getattr(self, name)[keep] for name in _RANGE_COLUMNS}
        return replace(self, range_first=first, **ranges)

    def take(self, shards: np.ndarray) -> Schedule:
        """The query shards that `shards`, bool [G], marks, with all their ranges."""
        first = np.concatenate(([0], np.cumsum(np.diff(self.range_first)[shards])))
        queries = {name: getattr(self, name)[shards] for name in _COLUMNS[:3]}
        ranges = {name: getattr(self, name)[shards[self.query]] for name in _RANGE_COLUMNS}
        seen = None if self.seen is None else Seen(self.seen.document[shards], self.seen.masks)
        return replace(self, **queries, range_first=first, **ranges, seen=seen)

    def lone(self, most: int) -> np.ndarray:
        """Which query shards have at most so many rows, read their own alone and are read by no others, bool [G]."""
        length = self.query_stop - self.query_start
        own = (self.range_totals(self.masked) == 1) & (np.diff(self.range_first) == 1)
        read = self.row_start[~self.masked & ~self.received]
        return own & (length <= most) & ~np.isin(self.query_start, read)

    @cached_property
    def array(self) -> np.ndarray:
        """All of it in one int64 array, headed by a fingerprint of the rest: what operators take."""
        columns = [getattr(self, name) for name in _COLUMNS]
        sizes = [len(self.query_start), len(self.source), 0, 0]
        if self.seen is not None:
            columns += [self.seen.document, *(getattr(self.seen.masks, name) for name in _MASK_COLUMNS)]
            sizes[2:] = len(self.seen.masks.length), len(self.seen.masks.block_start)
        body = np.concatenate([sizes, *columns]).astype(np.int64)
        digest = hashlib.blake2b(body.astype("<i8").tobytes(), digest_size=8).digest()
        return np.concatenate(([int.from_bytes(digest, "little", signed=True)], body))

    @cached_property
    def extent(self) -> tuple[int, int, int]:
        """Rows that must be there: of queries, of the local keys, of the receive buffer."""
        local, received = (self.row_stop[self.received == flag].max(initial=0) for flag in (False, True))
        return int(self.query_stop.max(initial=0)), int(local), int(received)

    @staticmethod
    def array_size(queries: int, ranges: int) -> int:
        """Elements of `array` for so many query shards and ranges of causal documents."""
        return 5 + 4 * queries + 1 + 6 * ranges

    @classmethod
    def from_array(cls, array: np.ndarray) -> Schedule:
        """The schedule that `array` was made from."""
        queries, ranges, documents, blocks = (int(x) for x in array[1:5])
        sizes = [queries, queries, queries, queries + 1] + [ranges] * 6
        if documents:
            sizes += [queries, documents, documents, documents, blocks, blocks, blocks]
        columns = np.split(array[5:], np.cumsum(sizes)[:-1])
        dtypes = {"received": bool, "masked": bool}
        own = {name: x.astype(dtypes.get(name, np.int64)) for name, x in zip(_COLUMNS, columns, strict=False)}
        return cls(**own, seen=Seen(columns[10], Masks(*columns[11:])) if documents else None)


_COLUMNS = tuple(field.name for field in fields(Schedule))[:10]
_RANGE_COLUMNS = _COLUMNS[4:]
_MASK_COLUMNS = tuple(field.name for field in fields(Masks))


def build_schedule(
    queries: Segments,
    local: Segments | None = None,
    received: Segments | None = None,
    masks: Masks | None = None,
) -> Schedule:
    """Join query shards with the KV segments of the same document that some of their rows see.

    Shards are disjoint: in a causal document a segment that begins below a query shard's end is that shard or lies
    wholly before it. masks: of the pack's documents; None, and where all are causal: causal.

    queries, local: shards of this rank with `row` in the local tensor. received: segments of the receive buffer. All in
    the order of their rows, as plans and routes list them.
    Leaving `local` or `received` out gives the schedule of the other part alone: outputs of several parts are
    merged by their log-sum-exp. Query shards that read nothing from the parts given are left out.
    """
    parts = [(part, flag) for part, flag in ((local, False), (received, True)) if part is not None]
    keys = Segments(*(np.concatenate([part[i] for part, _ in parts]) for i in range(len(queries))))
    in_received = np.concatenate([np.full(len(part.document), flag) for part, flag in parts])
    by_document = np.argsort(keys.document, kind="stable")
    keys, in_received = keys.take(by_document), in_received[by_document]

    first = np.searchsorted(keys.document, queries.document)
    count = np.searchsorted(keys.document, queries.document, side="right") - first
    query = np.repeat(np.arange(len(queries.document)), count)
    key = expand_ranges(first, count)
    seen_by = None if masks is None or masks.is_causal else masks
    if seen_by is None:
        keep = keys.start[key] < queries.stop[query]
    else:
        first_key, past_key = (
            seen_by.lowest(queries.document, queries.start),
            seen_by.past(queries.document, queries.stop - 1),
        )
        keep = (keys.start[key] < past_key[query]) & (keys.stop[key] > first_key[query])
    query, key = query[keep], key[keep]

    used, range_first = np.unique(query, return_index=True)
    start = keys.start[key]
    masked, seen = start == queries.start[query], None
    if seen_by is not None:
        # Intervals never go back: the last row sees least of what lies before, the first least of what lies behind.
        last_first = seen_by.lowest(queries.document, queries.stop - 1)
        first_past = seen_by.past(queries.document, queries.start)
        masked = (start < last_first[query]) | (keys.stop[key] > first_past[query])
        mine, document = np.unique(queries.document[used], return_inverse=True)
        seen = Seen(document, seen_by.take(mine))
    return Schedule(
        query_start=queries.row[used],
        query_stop=(queries.row + queries.stop - queries.start)[used],
        query_position=queries.start[used],
        range_first=np.append(range_first, len(key)),
        received=in_received[key],
        row_start=keys.row[key],
        row_stop=keys.row[key] + keys.stop[key] - start,
        position=start,
        masked=masked,
        source=keys.rank[key],
        seen=seen,
    )


def whole_pack_schedule(document_lengths: np.ndarray, masks: Masks | None = None) -> Schedule:
    """The schedule of one device that holds the whole pack. masks: None is causal."""
    offsets = document_offsets(document_lengths)[:-1]
    zeros = np.zeros_like(offsets)
    documents = Segments(np.arange(len(offsets)), zeros, np.asarray(document_lengths), zeros, offsets)
    return build_schedule(documents, local=documents, masks=masks)
