"""Tile tables of schedules whose rows see intervals of keys (`flashcp.sharding.masks`), not all that lies before them.

A query row sees one interval of the keys of its document, a key row is read by one interval of rows, and neither end
ever goes back from row to row. So what all rows of a tile see, and what any of them sees, follows from its first and
its last row, and a tile visits nothing else: its work grows with a window, not with the document.

Ends of intervals are kept in each row's *own frame*: as if all rows of its document lay around it in one tensor, it
being where it is. So rows beside it in the local tensor are in the frame of each other, and documents that share a tile
are compared as one. A range elsewhere is brought there by one number, its shift.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from flashcp.kernels.schedule import Schedule
from flashcp.kernels.tiles import (
    LOCAL,
    RECEIVED,
    RowBlocks,
    Tiles,
    join_ranges,
    mark_changes,
    order_of,
    share_tiles,
    small,
)
from flashcp.sharding.documents import expand_ranges

REACH_COLUMNS, RANGE_COLUMNS = 3, 5  # of `reach` and of `ranges`, for kernels
_End = Callable[[np.ndarray, np.ndarray], np.ndarray]


class _Side(NamedTuple):
    """Blocks of rows, the ranges that they read or are read by, when each range arrives, which blocks only their own
    rows read, and `reach`."""

    blocks: RowBlocks
    ranges: np.ndarray
    arrival: np.ndarray
    alone: np.ndarray
    reach: np.ndarray


def interval_query_tiles(schedule: Schedule, rows: int, tile_rows: int, by_source: bool = False) -> Tiles:
    """As `query_tiles`, of a schedule with masks: `Tiles` says what its tables hold then.

    A tile lists the ranges from the first to the last of which it reads something; one that reads nothing is left out.
    """
    assert schedule.seen is not None, "causal schedules have tables of their own"
    document, masks = schedule.seen
    query, received = schedule.query, schedule.received
    start, stop = small(schedule.row_start), small(schedule.row_stop)
    shift = _shift(schedule)
    source = np.where(received & by_source, schedule.source, -1)
    apart = mark_changes(query) | mark_changes(received) | mark_changes(source)
    apart[1:] |= (start[1:] != stop[:-1]) | (shift[1:] != shift[:-1])
    ranges, opens = join_ranges(apart, np.where(received, RECEIVED, LOCAL), start, stop, source, shift)
    bounds = small(np.searchsorted(opens, schedule.range_first))

    first, last = small(schedule.query_start), small(schedule.query_stop)
    nowhere = np.zeros_like(first)
    blocks = RowBlocks(nowhere, first, last, bounds[:-1], bounds[1:], nowhere.copy())
    reach = np.zeros((rows, REACH_COLUMNS), dtype=np.int32)
    _fill(reach, blocks, schedule.query_position, document, masks.lowest, masks.past)
    own = _own(blocks, ranges)
    _set_ends(reach, blocks, own, first)
    return _cut(_Side(blocks, ranges, schedule.arrival[opens], own, reach), tile_rows, keys=False)


def interval_key_tiles(schedule: Schedule, rows: int, tile_rows: int) -> Tiles:
    """As `key_tiles`, of a schedule with masks. Rows of `reach` for the receive buffer follow those of local rows."""
    assert schedule.seen is not None, "causal schedules have tables of their own"
    document, masks = schedule.seen
    behind = ~schedule.received * int(schedule.row_stop.max(initial=0))
    sort = order_of(schedule.row_start + behind)
    query, received = schedule.query[sort], schedule.received[sort]
    row_start, row_stop = small(schedule.row_start)[sort], small(schedule.row_stop)[sort]
    head = mark_changes(row_start) | mark_changes(received)
    assert head[mark_changes(row_stop)].all(), "ranges of a schedule overlap in part"

    start, stop = small(schedule.query_start)[query], small(schedule.query_stop)[query]
    shift = -_shift(schedule)[sort]
    apart = head.copy()
    apart[1:] |= (start[1:] != stop[:-1]) | (shift[1:] != shift[:-1])
    readers, opens = join_ranges(apart, np.full_like(start, LOCAL), start, stop, np.full_like(start, -1), shift)
    bounds = small(np.append(np.flatnonzero(head[opens]), len(opens)))
    at = np.flatnonzero(head)
    in_buffer = received[at]
    arrival = schedule.arrival[sort[at]]
    order = np.where(in_buffer, arrival, arrival.max(initial=0) + 1)
    blocks = RowBlocks(small(in_buffer * rows), row_start[at], row_stop[at], bounds[:-1], bounds[1:], order)

    received_rows = int(row_stop[received].max(initial=0))
    reach = np.zeros((rows + received_rows, REACH_COLUMNS), dtype=np.int32)
    _fill(reach, blocks, schedule.position[sort[at]], document[query[at]], masks.first_reader, masks.past_reader)
    own = ~in_buffer & _own(blocks, readers)
    _set_ends(reach, blocks, own, blocks.stop)
    return _cut(_Side(blocks, readers, np.zeros(len(readers), dtype=np.int32), own, reach), tile_rows, keys=True)


def visited_blocks(tiles: Tiles, step: int) -> np.ndarray:
    """Blocks of `step` rows that the kernels visit for each tile, without a mask and with it, int64 [tiles, 2]."""
    tile, entry = _listed(*tiles.table[:, 3:].T)
    begin, end, all_from, all_to = _clip(tiles.table, tiles.ranges, tiles.reach, tile, entry)
    ahead = np.minimum(-(-np.maximum(all_from - begin, 0) // step), -(-np.maximum(end - begin, 0) // step))
    start = begin + ahead * step
    full = np.maximum(np.minimum(all_to, end) - start, 0) // step
    masked = ahead + -(-np.maximum(end - start - full * step, 0) // step)
    return np.stack([np.bincount(tile, x, len(tiles.table)) for x in (full, masked)], axis=1).astype(np.int64)


def _shift(schedule: Schedule) -> np.ndarray:
    """What brings rows of each range into the frame of the query shard that reads it."""
    apart = schedule.query_position - schedule.query_start
    return small(schedule.position - schedule.row_start - apart[schedule.query])


def _fill(
    reach: np.ndarray, blocks: RowBlocks, position: np.ndarray, document: np.ndarray, first: _End, past: _End
) -> None:
    """The first two columns: for blocks that begin at a `position` of their document."""
    length = blocks.stop - blocks.start
    row = expand_ranges(blocks.start, length)
    away = np.repeat(position - blocks.start, length)
    whose, at = np.repeat(document, length), row + np.repeat(blocks.received, length)
    reach[at, 0] = first(whose, row + away) - away
    reach[at, 1] = past(whose, row + away) - away


def _own(blocks: RowBlocks, ranges: np.ndarray) -> np.ndarray:
    """Which blocks have one range, in the local tensor: themselves."""
    one = blocks.range_stop - blocks.range_first == 1
    if not len(ranges):
        return one
    entry = ranges[np.minimum(blocks.range_first, len(ranges) - 1)]
    return one & (entry[:, 0] == LOCAL) & (entry[:, 1] == blocks.start) & (entry[:, 2] == blocks.stop)


def _set_ends(reach: np.ndarray, blocks: RowBlocks, own: np.ndarray, end: np.ndarray) -> None:
    """The third column, of blocks that may share a tile. What their rows see ends with them."""
    start, stop = blocks.start[own], blocks.stop[own]
    row = expand_ranges(start, stop - start)
    first, past, ends = (np.repeat(column, stop - start) for column in (start, stop, end[own]))
    reach[row, 0] = np.maximum(reach[row, 0], first)
    reach[row, 1] = np.minimum(reach[row, 1], past)
    reach[row, 2] = ends


def _cut(side: _Side, tile_rows: int, keys: bool) -> Tiles:
    """Cut blocks into tiles, drop those without a range in which they read or are read, and sort the others."""
    blocks, ranges = side.blocks, side.ranges
    shared = share_tiles(blocks, ranges, side.alone, tile_rows)
    count = -(-(blocks.stop - blocks.start) // tile_rows)
    block = np.repeat(np.arange(len(count), dtype=np.int32), count)
    received, start, block_stop, first, last, order = (column[block] for column in blocks)
    row = small(expand_ranges(np.zeros_like(count), count)) * tile_rows + start
    table = np.stack((received, row, np.minimum(row + tile_rows, block_stop), first, last), axis=1)

    tile, entry = _listed(first, last)
    begin, end, _, _ = _clip(table, ranges, side.reach, tile, entry)
    there = begin < end
    tile, entry, length = tile[there], entry[there], (end - begin)[there]
    work = np.bincount(tile, length, len(table)).astype(np.int64)
    kept, opens = np.unique(tile, return_index=True)
    table[kept, 3] = entry[opens]
    table[kept, 4] = entry[np.append(opens[1:], len(tile)) - 1] + 1 if len(kept) else 0
    if not keys:
        np.maximum.at(order, tile, side.arrival[entry])
    table, work, order = table[kept], work[kept], order[kept]
    most = int(work.max(initial=0))
    table = table[order_of((order.astype(np.int64) << most.bit_length()) + (most - work))]
    covered = np.bincount(table[:, 0] != 0, table[:, 2] - table[:, 1], 2).astype(int)
    return Tiles(table, ranges, side.reach, (int(covered[0]), int(covered[1])), shared)


def _listed(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(tile, range) of every range that a tile lists."""
    count = (last - first).astype(np.int64)
    return np.repeat(np.arange(len(count)), count), expand_ranges(first.astype(np.int64), count)


def _clip(
    table: np.ndarray, ranges: np.ndarray, reach: np.ndarray, tile: np.ndarray, entry: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Of each range of a tile: the rows begin..end that any row of the tile sees, and those that all see."""
    offset, row, stop = (column[tile].astype(np.int64) for column in table[:, :3].T)
    start, end, shift = (ranges[entry, i].astype(np.int64) for i in (1, 2, 4))
    first, last = reach[offset + row, :2] - shift[:, None], reach[offset + stop - 1, :2] - shift[:, None]
    return np.maximum(start, first[:, 0]), np.minimum(end, last[:, 1]), last[:, 0], first[:, 1]
