"""Which calls of a varlen kernel compute a schedule: plain data, made once a schedule.

Such a kernel reads sequences that lie one behind the other. So there are up to three calls. The *own* rows of all query
shards, causal: whole documents, and each cut document's shard; they lie so in the local tensor and nothing is copied.
Then *prefixes*, read in full, of which few are left where plans cut few documents: those in the local tensor, and those
in the receive buffer. A document all of whose rows are here, but in another order (`ulysses`), is put in order instead.
Full documents are read as prefixes are. A kernel has one window a call, so windows may take more calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flashcp.kernels.schedule import Schedule
from flashcp.sharding.documents import expand_ranges


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows start[i] : stop[i] of a buffer, range behind range. start, stop: int64 [ranges], no range empty."""

    start: np.ndarray
    stop: np.ndarray

    @cached_property
    def as_slice(self) -> slice | None:
        """Where they lie one behind the other already; None if they do not."""
        if not len(self.start) or (self.start[1:] != self.stop[:-1]).any():
            return None
        return slice(int(self.start[0]), int(self.stop[-1]))

    @cached_property
    def index(self) -> np.ndarray:
        """Every row, int64 [rows]."""
        return expand_ranges(self.start, self.stop - self.start)

    @cached_property
    def turns(self) -> list[tuple[np.ndarray | None, np.ndarray]]:
        """(which of the rows, where they belong), so that no row of the buffer comes twice in one turn.

        A fixed order for sums of several shards that read the same rows. None: all of them.
        """
        count = self.stop - self.start
        order = np.argsort(self.start, kind="stable")
        first = np.flatnonzero(np.concatenate(([True], self.start[order][1:] != self.start[order][:-1])))
        turn = np.empty_like(order)
        turn[order] = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
        if not turn.any():
            return [(None, self.index)]
        offset = np.cumsum(count) - count
        turns: list[tuple[np.ndarray | None, np.ndarray]] = []
        for i in range(int(turn.max()) + 1):
            chosen = turn == i
            places = expand_ranges(offset[chosen], count[chosen])
            turns.append((places, self.index[places]))
        return turns


@dataclass(frozen=True, eq=False)
class Call:
    """One call. queries: rows of the local tensor, each once. keys: rows of the receive buffer if `received`, else of
    the local tensor. query_lengths, key_lengths: rows of each sequence, int64 [sequences]. left: as `Sequences` has it.
    """

    queries: Rows
    keys: Rows
    query_lengths: np.ndarray
    key_lengths: np.ndarray
    causal: bool
    received: bool
    left: int = -1


def varlen_calls(schedule: Schedule) -> list[Call]:
    """The calls whose results together, merged by their log-sum-exp, are those of the schedule.

    No range of the schedule overlaps another in part, as `build_schedule` makes them. Documents are causal, full or
    have a window.
    """
    window, full = _window_and_full(schedule)
    rows = schedule.row_stop - schedule.row_start
    shard = (schedule.query_stop - schedule.query_start)[schedule.query]
    own_rows = (schedule.position == schedule.query_position[schedule.query]) & (rows == shard) & ~full
    document = _documents_in_order(schedule, own_rows)
    calls = []
    for received in (False, True):
        here = (rows > 0) & (schedule.received == received)
        own = np.flatnonzero(here & own_rows)
        before = here & ~own_rows & (received | (document < 0)[schedule.query])
        limited = np.flatnonzero(before & schedule.masked)
        prefixes = np.flatnonzero(before & ~schedule.masked)
        calls += _own_rows(schedule, own, document, window, received) if len(own) else []
        calls += [_prefixes(schedule, prefixes, received)] if len(prefixes) else []
        calls += _limited(schedule, limited, window, received) if len(limited) else []
    return calls


def _window_and_full(schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """The window of each query shard, 0 for none, int64 [G], and whether each range is of a full document, bool [R]."""
    if schedule.seen is None:
        return np.zeros_like(schedule.query_start), np.zeros_like(schedule.masked)
    document, masks = schedule.seen
    full = np.isin(document, masks.block_document)
    return np.where(full, 0, masks.window[document]), full[schedule.query]


def _own_rows(
    schedule: Schedule, own: np.ndarray, document: np.ndarray, window: np.ndarray, received: bool
) -> list[Call]:
    """The causal calls, one for each window. own: the ranges that are their query shard's own rows."""
    query = schedule.query[own]
    sequence = query if received else np.where(document >= 0, document, schedule.query_start)[query]
    order = np.lexsort((schedule.query_position[query], sequence))
    own, query, sequence = own[order], query[order], sequence[order]
    opens = np.concatenate(([True], sequence[1:] != sequence[:-1]))
    rows = schedule.row_stop[own] - schedule.row_start[own]
    lengths = np.add.reduceat(rows, np.flatnonzero(opens))
    left = np.where(window[query[opens]] < lengths, window[query[opens]] - 1, -1)
    calls = []
    for each in np.unique(left).tolist():
        chosen = (left == each)[np.cumsum(opens) - 1]
        keys = Rows(schedule.row_start[own[chosen]], schedule.row_stop[own[chosen]])
        queries = Rows(schedule.query_start[query[chosen]], schedule.query_stop[query[chosen]])
        calls.append(Call(queries, keys, lengths[left == each], lengths[left == each], True, received, each))
    return calls


def _prefixes(schedule: Schedule, ranges: np.ndarray, received: bool) -> Call:
    """The call of ranges that are read in full: each query shard is a sequence with all of its ranges as keys."""
    query, starts = np.unique(schedule.query[ranges], return_index=True)  # ranges lie query by query
    queries = Rows(schedule.query_start[query], schedule.query_stop[query])
    keys = Rows(schedule.row_start[ranges], schedule.row_stop[ranges])
    lengths = np.add.reduceat(keys.stop - keys.start, starts)
    return Call(queries, keys, queries.stop - queries.start, lengths, causal=False, received=received)


def _limited(schedule: Schedule, ranges: np.ndarray, window: np.ndarray, received: bool) -> list[Call]:
    """The calls of ranges before their query shard that its window cuts: each is a sequence, of the rows that see its
    last key, and of the keys that one of them sees.

    A kernel counts a window from the sequence's ends: from the last row to the last key. That differs from shard to
    shard only where shards are shorter than the window, and calls are made one for each.
    """
    query = schedule.query[ranges]
    first, window = schedule.query_position[query], window[query]
    past = schedule.position[ranges] + schedule.row_stop[ranges] - schedule.row_start[ranges]
    lowest = np.maximum(schedule.position[ranges], first - window + 1)
    stop = np.minimum(first + schedule.query_stop[query] - schedule.query_start[query], past - 1 + window)
    left = past + window - 1 - stop
    turn = np.arange(len(ranges)) - np.searchsorted(query, query)  # a row comes once in a call
    calls = []
    for each, again in sorted(set(zip(left.tolist(), turn.tolist(), strict=True))):
        chosen = (left == each) & (turn == again)
        start, rows, keys = schedule.query_start[query[chosen]], (stop - first)[chosen], (past - lowest)[chosen]
        queries = Rows(start, start + rows)
        read = Rows(schedule.row_stop[ranges[chosen]] - keys, schedule.row_stop[ranges[chosen]])
        calls.append(Call(queries, read, rows, keys, False, received, each))
    return calls


def _documents_in_order(schedule: Schedule, own_rows: np.ndarray) -> np.ndarray:
    """For each query shard of a document that is here from its start on, as shards that follow each other: the local
    row at which that document starts. -1 for all other query shards. int64 [G]."""
    rows = schedule.row_stop - schedule.row_start
    local = ~schedule.received
    before = schedule.range_totals(rows * (local & ~own_rows))
    own = schedule.range_totals(local & own_rows) > 0
    whole = own & (before == schedule.query_position)
    document = np.full(len(whole), -1)
    if not (whole & (schedule.query_position > 0)).any():
        return document
    at_start = local & (schedule.position == 0) & whole[schedule.query]
    document[schedule.query[at_start]] = schedule.row_start[at_start]
    shards = np.flatnonzero(whole)
    shards = shards[np.lexsort((schedule.query_position[shards], document[shards]))]
    position, start = schedule.query_position[shards], document[shards]
    end = position + (schedule.query_stop - schedule.query_start)[shards]
    follows = np.concatenate(([False], (start[1:] == start[:-1]) & (position[1:] == end[:-1])))
    document[np.isin(document, start[~follows & (position > 0)])] = -1  # a shard of theirs asks nothing here
    return document
