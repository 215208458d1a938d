"""In which steps a CPU computes a schedule: plain data.

Short documents come many at a time: each call costs more than they do. Of causal documents every range is one call of
its own. Under other masks, and where scores are held in memory, a query shard is cut into tiles of rows, and of each
range only the keys between the first that a row of the tile sees and the last: those that all rows see without a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from flashcp.kernels.schedule import Schedule
from flashcp.sharding.documents import expand_ranges

SHORT = 256
"""Rows of a query shard that is computed together with others."""
BATCH_PAIRS = 2**20
TILE = 256
"""Query rows of a tile. Twice as many are no faster, and edges are as wide as a tile is high."""
WORTH_A_CALL = 2 * TILE
"""Keys that all rows of a tile see, from which on they are a call of their own, without a mask."""
MOST_KEYS = 2048
"""Keys of a call that holds its scores in memory."""


class Seen(NamedTuple):
    """Of each row the keys that it sees, lowest <= key < past, counted from the first key at hand. int64."""

    lowest: np.ndarray
    past: np.ndarray


class Piece(NamedTuple):
    """Keys that the rows of a tile read. mask: whether row i reads keys 0 to i alone, or what each row sees."""

    received: bool
    keys: slice
    mask: bool | Seen


class Tile(NamedTuple):
    """Local query rows that lie one behind the other, and what they read."""

    rows: slice
    pieces: list[Piece]


class Batch(NamedTuple):
    """Query shards [B] that read their own rows alone, each padded to L rows.

    rows: local rows, shard behind shard, int64 [R]. places: where each stands among the B * L. seen: [B, L], rows that
    pad see the first key; None: causal.
    """

    shards: int
    length: int
    rows: np.ndarray
    places: np.ndarray
    seen: Seen | None


def steps(schedule: Schedule, holds_scores: bool) -> Iterator[Batch | Tile]:
    """All steps of a schedule. holds_scores: whether calls hold their scores in memory, and know no causal ones."""
    if not len(schedule.query_start):
        return
    lowest, past = _intervals(schedule)
    offset = np.cumsum(schedule.query_stop - schedule.query_start) - (schedule.query_stop - schedule.query_start)
    masked = holds_scores or schedule.seen is not None
    padded = _padded_lengths(schedule)
    for length in np.unique(padded[padded > 0]).tolist():
        shards = np.flatnonzero(padded == length)
        if len(shards) == 1:
            padded[shards] = 0
            continue
        most = max(1, BATCH_PAIRS // (length * max(length, 128)))
        for chosen in np.split(shards, range(most, len(shards), most)):
            start = schedule.query_start[chosen]
            rows = schedule.query_stop[chosen] - start
            places = expand_ranges(np.arange(len(chosen)) * length, rows)
            seen = None
            if masked:
                at = expand_ranges(offset[chosen], rows)
                position = np.repeat(schedule.query_position[chosen], rows)
                seen = Seen(np.zeros((len(chosen), length), dtype=np.int64), np.ones((len(chosen), length), np.int64))
                seen.lowest.reshape(-1)[places] = lowest[at] - position
                # A shard of a longer document may see keys that are not among its own, where others pad.
                seen.past.reshape(-1)[places] = np.minimum(past[at] - position, np.repeat(rows, rows))
            yield Batch(len(chosen), length, expand_ranges(start, rows), places, seen)

    alone = np.flatnonzero(padded == 0)
    for shard, start, stop in zip(
        alone.tolist(), schedule.query_start[alone].tolist(), schedule.query_stop[alone].tolist(), strict=True
    ):
        ranges = range(schedule.range_first[shard], schedule.range_first[shard + 1])
        if not masked:
            yield Tile(slice(start, stop), [_whole_range(schedule, r) for r in ranges])
            continue
        mine = slice(offset[shard], offset[shard] + stop - start)
        seen = Seen(lowest[mine], past[mine])
        alike = seen.lowest[0] == seen.lowest[-1] and seen.past[0] == seen.past[-1]
        rows = stop - start if alike and not holds_scores else TILE
        for first in range(0, stop - start, rows):
            of_tile = Seen(*(x[first : first + rows] for x in seen))
            pieces = [piece for r in ranges for piece in _pieces(schedule, r, of_tile, holds_scores)]
            yield Tile(slice(start + first, min(start + first + rows, stop)), pieces)


def _whole_range(schedule: Schedule, r: int) -> Piece:
    keys = slice(int(schedule.row_start[r]), int(schedule.row_stop[r]))
    return Piece(bool(schedule.received[r]), keys, bool(schedule.masked[r]))


def _pieces(schedule: Schedule, r: int, seen: Seen, holds_scores: bool) -> Iterator[Piece]:
    """What the rows of a tile see of a range, cut where masks begin and end."""
    position = int(schedule.position[r])
    row = int(schedule.row_start[r]) - position  # of the document's first row, were it there
    begin = max(position, int(seen.lowest[0]))
    end = min(position + int(schedule.row_stop[r] - schedule.row_start[r]), int(seen.past[-1]))
    all_from, all_to = int(seen.lowest[-1]), int(seen.past[0])  # intervals never go back
    cuts = {begin, end}
    if min(all_to, end) - max(all_from, begin) >= WORTH_A_CALL:
        cuts |= {min(max(all_from, begin), end), min(max(all_to, begin), end)}
    if holds_scores:
        cuts |= set(range(begin, end, MOST_KEYS))
    bounds = sorted(cuts)
    for start, stop in pairwise(bounds):
        if start < end:
            keys = slice(row + start, row + stop)
            by_all = all_from <= start and stop <= all_to
            yield Piece(bool(schedule.received[r]), keys, not by_all and Seen(seen.lowest - start, seen.past - start))


def _intervals(schedule: Schedule) -> Seen:
    """What each query row sees of its document, shard behind shard."""
    rows = schedule.query_stop - schedule.query_start
    position = expand_ranges(schedule.query_position, rows)
    if schedule.seen is None:
        return Seen(np.zeros_like(position), position + 1)
    document = np.repeat(schedule.seen.document, rows)
    masks = schedule.seen.masks
    return Seen(masks.lowest(document, position), masks.past(document, position))


def _padded_lengths(schedule: Schedule) -> np.ndarray:
    """The rows that each short query shard which reads its own rows alone is padded to, a quarter more at most; 0 for
    all other shards. int64 [G]."""
    rows = schedule.query_stop - schedule.query_start
    first = schedule.range_first[:-1]
    own = (np.diff(schedule.range_first) == 1) & (rows <= SHORT)
    r = np.minimum(first, len(schedule.source) - 1)
    own &= ~schedule.received[r] if len(r) and len(schedule.source) else False
    if not own.any():
        return np.zeros_like(rows)
    own &= (schedule.row_start[r] == schedule.query_start) & (schedule.row_stop[r] == schedule.query_stop)
    step = 2 ** np.maximum(np.floor(np.log2(np.maximum(rows, 1))).astype(np.int64) - 2, 0)
    return np.where(own, -(-rows // step) * step, 0)
