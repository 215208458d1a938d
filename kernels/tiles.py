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

COLUMNS = ("received", "row", "stop", "range_first", "range_stop")
TILE_COLUMNS, RANGE_COLUMNS = 5, 4  # of `table` and of `ranges`, for kernels: the strides of their rows
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
    shared: whether several documents lie in one tile.

    Of a schedule with masks (`kernels/intervals.py`) a tile reads of each range what its rows' intervals hold of it.
    table: `received` is 0, or where rows of the receive buffer begin in reach. ranges [ranges, 5]: no OWN, and behind
    the source the shift: a row there plus the shift is in the frame of the tile's rows. reach [rows, 3]: the interval
    of each row, begin and end, in its frame, and where its document begins (query tiles) or ends (key tiles) in the
    local tensor if several documents may share its tile, else 0.
    """

    table: np.ndarray
    ranges: np.ndarray
    reach: np.ndarray
    rows: tuple[int, int]
    shared: bool

    @property
    def ready(self) -> int:
        """How many tiles, the first ones, wait for nobody."""
        waits = np.concatenate(([0], np.cumsum(self.ranges[:, 3] >= 0)))
        return int((waits[self.table[:, 3]] == waits[self.table[:, 4]]).sum())


class RowBlocks(NamedTuple):
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
    query, received, masked = schedule.query, schedule.received, schedule.masked
    start, stop = small(schedule.row_start), small(schedule.row_stop)

    # Ranges that touch are one; nothing joins on behind the shard's own rows.
    apart = mark_changes(query) | mark_changes(received)
    apart[1:] |= (start[1:] != stop[:-1]) | masked[:-1]
    source = np.where(received & by_source, schedule.source, -1)
    ranges, opens = join_ranges(apart | mark_changes(source), np.where(masked, OWN, received), start, stop, source)
    bounds = small(np.searchsorted(opens, schedule.range_first))
    arrival = np.zeros(len(bounds) - 1, dtype=np.int32)
    np.maximum.at(arrival, query, schedule.arrival)
    shards = np.zeros_like(arrival), small(schedule.query_start), small(schedule.query_stop)
    return _cut(RowBlocks(*shards, bounds[:-1], bounds[1:], arrival), ranges, rows, tile_rows, keys=False)


def key_tiles(schedule: Schedule, rows: int, tile_rows: int, share: bool = True) -> Tiles:
    """Tiles of at most `tile_rows` key rows and the query rows that read them, for dK and dV.

    Received rows come first, source by source as they lie in the buffer, for their gradients have a way to go.
    share: whether several documents may lie in one tile.
    """
    behind = ~schedule.received * int(schedule.row_stop.max(initial=0))
    sort = order_of(schedule.row_start + behind)  # stable: the readers of a row stay in the order of their rows
    query, received, masked = schedule.query[sort], schedule.received[sort], schedule.masked[sort]
    row_start, row_stop = small(schedule.row_start)[sort], small(schedule.row_stop)[sort]

    # A query shard reads all of a key shard or nothing: ranges over the same rows are one block with many readers.
    head = mark_changes(row_start) | mark_changes(received)
    assert head[mark_changes(row_stop)].all(), "ranges of a schedule overlap in part"

    # Readers that touch are one; nothing joins on before the block's own rows.
    start, stop = small(schedule.query_start)[query], small(schedule.query_stop)[query]
    apart = head | masked
    apart[1:] |= start[1:] != stop[:-1]
    readers, opens = join_ranges(apart, np.where(masked, OWN, LOCAL), start, stop, np.full_like(start, -1))
    bounds = small(np.append(np.flatnonzero(head[opens]), len(opens)))
    first = np.flatnonzero(head)
    block_received = received[first]
    arrival = schedule.arrival[sort[first]]
    order = np.where(block_received, arrival, arrival.max(initial=0) + 1)
    columns = block_received.astype(np.int32), row_start[first], row_stop[first]
    return _cut(RowBlocks(*columns, bounds[:-1], bounds[1:], order), readers, rows, tile_rows, keys=True, share=share)


def small(column: np.ndarray) -> np.ndarray:
    """As the tables hold it: a pack has fewer than 2^31 rows. A copy."""
    return column.astype(np.int32)


def order_of(numbers: np.ndarray) -> np.ndarray:
    """The stable order of non-negative numbers, 16 bits at a time: numpy sorts those without comparing."""
    order = np.argsort(numbers.astype(np.uint16), kind="stable")
    for shift in range(16, int(numbers.max(initial=0)).bit_length(), 16):
        digit = (numbers >> shift).astype(np.uint16)
        order = order[np.argsort(digit[order], kind="stable")]
    return order


def mark_changes(column: np.ndarray) -> np.ndarray:
    """Mask of the entries that differ from the one before; the first one does."""
    return np.concatenate(([True], column[1:] != column[:-1]))[: len(column)]


def join_ranges(
    apart: np.ndarray, place: np.ndarray, start: np.ndarray, stop: np.ndarray, *more: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Entries as ranges, each joined to the one before unless `apart`, and the entry that opens each range.

    A range with own rows in it is OWN, the highest of places.
    """
    opens = np.flatnonzero(apart)
    stops = stop[np.append(opens[1:], len(apart))[: len(opens)] - 1]
    places = np.maximum.reduceat(place, opens) if len(opens) else opens
    columns = small(places), start[opens], stops, *(small(column)[opens] for column in more)
    return np.stack(columns, axis=1), opens


def _cut(blocks: RowBlocks, ranges: np.ndarray, rows: int, tile_rows: int, keys: bool, share: bool = True) -> Tiles:
    """Cut blocks into tiles and sort them. keys: own runs follow a tile, else they lead up to it."""
    own = np.full(len(blocks.start), -1, dtype=np.int32)
    entry = np.flatnonzero(ranges[:, 0] == OWN)
    owner = np.searchsorted(blocks.range_stop, entry, side="right")
    own[owner] = ranges[entry, 2 if keys else 1]
    steps = np.zeros(rows + 1, dtype=np.int32)
    steps[blocks.start[owner]] += own[owner]
    steps[blocks.stop[owner]] -= own[owner]
    reach = np.cumsum(steps[:-1], dtype=np.int32)

    covered = np.bincount(blocks.received, blocks.stop - blocks.start, 2).astype(int)
    alone = (own == (blocks.stop if keys else blocks.start)) & (blocks.range_stop - blocks.range_first == 1)
    shared = share and share_tiles(blocks, ranges, alone, tile_rows)
    count = -(-(blocks.stop - blocks.start) // tile_rows)
    block = np.repeat(np.arange(len(count), dtype=np.int32), count)
    received, start, block_stop, first, last, order = (column[block] for column in blocks)
    row = small(expand_ranges(np.zeros_like(count), count)) * tile_rows + start
    stop = np.minimum(row + tile_rows, block_stop)
    to_read = np.concatenate(([0], np.cumsum(ranges[:, 2] - ranges[:, 1], dtype=np.int64)))
    work = to_read[last] - to_read[first]
    # An own run is read from the tile on, or up to it: tiles inside a block read less and less, or more and more.
    work -= (own[block] >= 0) * (row - start if keys else block_stop - stop)
    most = int(work.max(initial=0))
    sort = order_of((order.astype(np.int64) << most.bit_length()) + (most - work))
    table = np.stack((received, row, stop, first, last), axis=1).take(sort, axis=0)
    return Tiles(table, ranges, reach, (int(covered[0]), int(covered[1])), shared)


def share_tiles(blocks: RowBlocks, ranges: np.ndarray, alone: np.ndarray, tile_rows: int) -> bool:
    """Join short blocks that only their own rows read and that touch, as long as they fit in one tile together.

    The first of those that share a tile becomes all of them, in place, and the others become empty. Returns whether
    any do.
    """
    short = np.flatnonzero(alone & (blocks.stop - blocks.start <= tile_rows // 2))
    if len(short) < 2:
        return False
    short = short[np.argsort(blocks.start[short])]
    start, stop = blocks.start[short], blocks.stop[short]
    gaps = np.append(np.flatnonzero(start[1:] != stop[:-1]) + 1, len(short))
    run_end = gaps[np.searchsorted(gaps, np.arange(len(short)), side="right")]
    following = np.minimum(np.searchsorted(stop, start + tile_rows, side="right"), run_end).tolist()
    group = [0]
    while following[group[-1]] < len(short):
        group.append(following[group[-1]])
    leader, last = short[group], np.array([*group[1:], len(short)]) - 1
    blocks.stop[short] = start
    blocks.stop[leader] = ranges[blocks.range_first[leader], 2] = stop[last]
    return len(group) < len(short)
