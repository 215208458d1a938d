"""Which calls of a varlen kernel compute a schedule: plain data, made once a schedule.

Such a kernel reads sequences that lie one behind the other. So there are up to three calls. The *own* rows of all query
shards, causal: whole documents, and each cut document's shard; they lie so in the local tensor and nothing is copied.
Then *prefixes*, read in full, of which few are left where plans cut few documents: those in the local tensor, and those
in the receive buffer. A document all of whose rows are here, but in another order (`ulysses`), is put in order instead.
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
    the local tensor. query_lengths, key_lengths: rows of each sequence, int64 [sequences]."""

    queries: Rows
    keys: Rows
    query_lengths: np.ndarray
    key_lengths: np.ndarray
    causal: bool
    received: bool


def varlen_calls(schedule: Schedule) -> list[Call]:
    """The calls whose results together, merged by their log-sum-exp, are those of the schedule.

    No range of the schedule overlaps another in part, as `build_schedule` makes them.
    """
    document = _documents_in_order(schedule)
    filled = schedule.row_stop > schedule.row_start
    calls = []
    for received in (False, True):
        here = filled & (schedule.received == received)
        own = np.flatnonzero(here & schedule.masked)
        prefixes = np.flatnonzero(here & ~schedule.masked & (received | (document < 0)[schedule.query]))
        calls += [_own_rows(schedule, own, document, received)] if len(own) else []
        calls += [_prefixes(schedule, prefixes, received)] if len(prefixes) else []
    return calls


def _own_rows(schedule: Schedule, own: np.ndarray, document: np.ndarray, received: bool) -> Call:
    """The causal call. own: the ranges that are their query shard's own rows."""
    query = schedule.query[own]
    sequence = query if received else np.where(document >= 0, document, schedule.query_start)[query]
    order = np.lexsort((schedule.query_position[query], sequence))
    own, sequence = own[order], sequence[order]
    starts = np.flatnonzero(np.concatenate(([True], sequence[1:] != sequence[:-1])))
    keys = Rows(schedule.row_start[own], schedule.row_stop[own])
    lengths = np.add.reduceat(keys.stop - keys.start, starts)
    queries = Rows(schedule.query_start[query[order]], schedule.query_stop[query[order]])
    return Call(queries, keys, lengths, lengths, causal=True, received=received)


def _prefixes(schedule: Schedule, ranges: np.ndarray, received: bool) -> Call:
    """The call of ranges that are read in full: each query shard is a sequence with all of its ranges as keys."""
    query, starts = np.unique(schedule.query[ranges], return_index=True)  # ranges lie query by query
    queries = Rows(schedule.query_start[query], schedule.query_stop[query])
    keys = Rows(schedule.row_start[ranges], schedule.row_stop[ranges])
    lengths = np.add.reduceat(keys.stop - keys.start, starts)
    return Call(queries, keys, queries.stop - queries.start, lengths, causal=False, received=received)


def _documents_in_order(schedule: Schedule) -> np.ndarray:
    """For each query shard of a document that is here from its start on, as shards that follow each other: the local
    row at which that document starts. -1 for all other query shards. int64 [G]."""
    rows = schedule.row_stop - schedule.row_start
    local = ~schedule.received
    before = schedule.range_totals(rows * (local & ~schedule.masked))
    own = schedule.range_totals(local & schedule.masked) > 0
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
    follows = np.concatenate(([True], (start[1:] == start[:-1]) & (position[1:] == end[:-1])))
    document[np.isin(document, start[~follows & (position > 0)])] = -1  # a shard of theirs asks nothing here
    return document
