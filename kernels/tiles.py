"""The tile schedule: which rows a program of the attention kernels works on and which rows it reads, as tables.

A tile never copies its list of ranges: it points into the list of its shard, and what lies inside the shard itself
follows from the tile's own rows. So tables grow with shards + rows / tile rows, never with pairs of tiles.

Forward and dQ walk *query tiles*; dK and dV walk *key tiles* over the transposed lists. The rows of a document that lie
next to each other on this rank are one *own run*: a query row x reads the run from its first row up to x, a key row y
is read by the run from y to its last row. Around its own rows a tile needs a mask, everywhere else it needs none.
Short documents that nobody else reads lie next to each other, so several may share one tile under that same mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flashcp.kernels.schedule import Schedule
from flashcp.sharding.documents import expand_ranges

__all__ = ["COLUMNS", "LOCAL", "OWN", "RECEIVED", "Tiles", "key_tiles", "query_tiles"]

COLUMNS = ("received", "row", "stop", "range_first", "range_stop")
LOCAL, RECEIVED, OWN = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tables of one kernel launch, all int32.

    table [tiles, 5], COLUMNS. row, stop: the tile's rows, in the receive buffer if `received`, else in the local
    tensor. range_first, range_stop: its entries of `ranges`.
    ranges [ranges, 4]: (place, start, stop, source). LOCAL and RECEIVED: rows there that every row of the tile reads
    (query tiles) or is read by (key tiles, whose readers are always local). OWN: the own run of the tile's rows, from
    `start` to the tile (query tiles) or from the tile to `stop` (key tiles). source: the rank whose arrival the range
    waits for, -1 for none: for local rows, for key tiles, and unless query tiles are made `by_source`.
    reach [local rows]: where each row's own run begins (query tiles) or ends (key tiles): the other bound of the mask.
    rows: how many rows of the local tensor and of the receive buffer lie in a tile.
    """

    table: np.ndarray
    ranges: np.ndarray
    reach: np.ndarray
    rows: tuple[int, int]

    @property
    def ready(self) -> int:
        """How many tiles, the first ones, wait for nobody."""
        waits = np.concatenate(([0], np.cumsum(self.ranges[:, 3] >= 0)))
        return int((waits[self.table[:, 3]] == waits[self.table[:, 4]]).sum())


class _Blocks(NamedTuple):
    """What is cut into tiles: rows that all read the same ranges. Columns as in Tiles, and the class in the order."""

    received: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    range_first: np.ndarray
    range_stop: np.ndarray
    order: np.ndarray


def query_tiles(schedule: Schedule, rows: int, tile_rows: int, by_source: bool = False) -> Tiles:
    """Tiles of at most `tile_rows` query rows, over a local tensor of `rows` rows, for forward and dQ.

    Tiles that read local rows alone come first, then by the arrival of the last source they read (sources arrive in
    the order in which they lie in the receive buffer), those with much to read before those with little.
    by_source: rows of different sources stay different ranges and name theirs, for a kernel that waits for each.
    """
    blocks = len(schedule.query_start)
    block = _query(schedule)
    arrival = np.zeros(blocks, dtype=np.int64)
    np.maximum.at(arrival, block, _arrival(schedule))
    sort = _sort(block, schedule.received, schedule.row_start)
    block, received, masked = block[sort], schedule.received[sort], schedule.masked[sort]
    start, stop = schedule.row_start[sort], schedule.row_stop[sort]
    source = np.where(received & by_source, schedule.source[sort], -1)

    # Ranges that touch are one; nothing joins on behind the block's own rows.
    touches = (block[1:] == block[:-1]) & (received[1:] == received[:-1]) & (start[1:] == stop[:-1])
    touches &= source[1:] == source[:-1]
    opens, closes = _runs(touches & ~masked[:-1], len(block))
    place = np.where(masked[closes], OWN, received[opens])
    ranges = np.stack((place, start[opens], stop[closes], source[opens]), axis=1)
    bounds = _bounds(block[opens], blocks)
    columns = (np.zeros(blocks, dtype=np.int64), schedule.query_start, schedule.query_stop)
    return _cut(_Blocks(*columns, *bounds, arrival), ranges, rows, tile_rows, keys=False)


def key_tiles(schedule: Schedule, rows: int, tile_rows: int) -> Tiles:
    """Tiles of at most `tile_rows` key rows and the query rows that read them, for dK and dV.

    Received rows come first, source by source as they lie in the buffer, for their gradients have a way to go.
    """
    query = _query(schedule)
    sort = _sort(schedule.received, schedule.row_start, schedule.query_start[query])
    query, received, masked = query[sort], schedule.received[sort], schedule.masked[sort]
    row_start, row_stop = schedule.row_start[sort], schedule.row_stop[sort]

    # A query shard reads all of a key shard or nothing: ranges over the same rows are one block with many readers.
    same = (row_start[1:] == row_start[:-1]) & (received[1:] == received[:-1])
    heads, _ = _runs(same, len(query))
    block = np.cumsum(heads) - 1
    assert np.array_equal(row_stop[heads][block], row_stop), "ranges of a schedule overlap in part"

    # Readers that touch are one; nothing joins on before the block's own rows.
    start, stop = schedule.query_start[query], schedule.query_stop[query]
    opens, closes = _runs(same & (start[1:] == stop[:-1]) & ~masked[1:], len(query))
    place = np.where(masked[opens], OWN, LOCAL)
    readers = np.stack((place, start[opens], stop[closes], np.full_like(place, -1)), axis=1)
    bounds = _bounds(block[opens], int(heads.sum()))
    arrival = _arrival(schedule)[sort][heads]
    order = np.where(received[heads], arrival, arrival.max(initial=0) + 1)
    columns = (received[heads].astype(np.int64), row_start[heads], row_stop[heads])
    return _cut(_Blocks(*columns, *bounds, order), readers, rows, tile_rows, keys=True)


def _sort(first: np.ndarray, second: np.ndarray, third: np.ndarray) -> np.ndarray:
    """The order by three columns of non-negative numbers that together take 63 bits: one sort instead of three."""
    bits = [int(column.max(initial=0)).bit_length() for column in (second, third)]
    return np.argsort((((first.astype(np.int64) << bits[0]) | second) << bits[1]) | third)


def _query(schedule: Schedule) -> np.ndarray:
    """The query shard that each range belongs to."""
    return np.repeat(np.arange(len(schedule.query_start)), np.diff(schedule.range_first))


def _arrival(schedule: Schedule) -> np.ndarray:
    """Per range: 0 for local rows, else 1, 2, ... for sources in the order they lie in the receive buffer."""
    arrival = np.zeros(len(schedule.source), dtype=np.int64)
    source, row = schedule.source[schedule.received], schedule.row_start[schedule.received]
    if source.size:
        lowest = np.full(int(source.max()) + 1, np.iinfo(np.int64).max)
        np.minimum.at(lowest, source, row)
        arrival[schedule.received] = 1 + np.argsort(np.argsort(lowest))[source]
    return arrival


def _runs(joined: np.ndarray, entries: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the entries that open and that close a run; joined[i] joins entry i + 1 to entry i."""
    return np.concatenate(([True], ~joined))[:entries], np.concatenate((~joined, [True]))[:entries]


def _bounds(owner: np.ndarray, owners: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the entries of each owner begin and end in a sorted list of owners."""
    stops = np.cumsum(np.bincount(owner, minlength=owners))
    return np.concatenate(([0], stops))[:owners], stops


def _cut(blocks: _Blocks, ranges: np.ndarray, rows: int, tile_rows: int, keys: bool) -> Tiles:
    """Cut blocks into tiles and sort them. keys: own runs follow a tile, else they lead up to it."""
    own = np.full(len(blocks.start), -1)
    entry = np.flatnonzero(ranges[:, 0] == OWN)
    owner = np.searchsorted(blocks.range_stop, entry, side="right")
    own[owner] = ranges[entry, 2 if keys else 1]
    steps = np.zeros(rows + 1, dtype=np.int32)
    steps[blocks.start[owner]] += own[owner].astype(np.int32)
    steps[blocks.stop[owner]] -= own[owner].astype(np.int32)
    reach = np.cumsum(steps[:-1], dtype=np.int32)

    alone = (own == (blocks.stop if keys else blocks.start)) & (blocks.range_stop - blocks.range_first == 1)
    blocks, ranges = _share_tiles(blocks, ranges, alone, tile_rows)
    count = -(-(blocks.stop - blocks.start) // tile_rows)
    block = np.repeat(np.arange(len(count)), count)
    row = blocks.start[block] + tile_rows * expand_ranges(np.zeros_like(count), count)
    stop = np.minimum(row + tile_rows, blocks.stop[block])
    to_read = np.concatenate(([0], np.cumsum(ranges[:, 2] - ranges[:, 1])))
    work = (to_read[blocks.range_stop] - to_read[blocks.range_first])[block]
    # An own run is read from the tile on, or up to it: tiles inside a block read less and less, or more and more.
    work -= (row - blocks.start[block]) if keys else (blocks.stop[block] - stop)
    sort = np.argsort((blocks.order[block] << 40) - work)
    columns = (blocks.received[block], row, stop, blocks.range_first[block], blocks.range_stop[block])
    covered = np.bincount(blocks.received, blocks.stop - blocks.start, 2).astype(int)
    table = np.stack(columns, axis=1)[sort].astype(np.int32)
    return Tiles(table, ranges.astype(np.int32), reach, (int(covered[0]), int(covered[1])))


def _share_tiles(blocks: _Blocks, ranges: np.ndarray, alone: np.ndarray, tile_rows: int) -> tuple[_Blocks, np.ndarray]:
    """Join short blocks that only their own rows read and that touch, as long as they fit in one tile together."""
    alone = alone & (blocks.stop - blocks.start <= tile_rows // 2)
    short = np.flatnonzero(alone)
    if len(short) < 2:
        return blocks, ranges
    short = short[np.argsort(blocks.start[short])]
    start, stop = blocks.start[short], blocks.stop[short]
    gaps = np.append(np.flatnonzero(start[1:] != stop[:-1]) + 1, len(short))
    run_end = gaps[np.searchsorted(gaps, np.arange(len(short)), side="right")]
    following = np.minimum(np.searchsorted(stop, start + tile_rows, side="right"), run_end).tolist()
    group = [0]
    while following[group[-1]] < len(short):
        group.append(following[group[-1]])
    start, stop = start[group], stop[np.array([*group[1:], len(short)]) - 1]
    entry = len(ranges) + np.arange(len(group))
    joined = np.stack((np.full(len(group), OWN), start, stop, np.full(len(group), -1)), axis=1)
    ranges = np.concatenate((ranges, joined))
    shared = _Blocks(np.zeros_like(start), start, stop, entry, entry + 1, blocks.order[short[group]])
    kept = _Blocks(*(column[~alone] for column in blocks))
    return _Blocks(*(np.concatenate(pair) for pair in zip(kept, shared, strict=True))), ranges
