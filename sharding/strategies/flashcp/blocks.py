"""After the search: bidirectional blocks that fit on a rank become whole again, and ranks equal again.

The search lets no tail begin inside such a block; heads, which equalise tokens to the row, may end inside one.
"""

from __future__ import annotations

import numpy as np

from flashcp.sharding.documents import sum_by
from flashcp.sharding.masks import Masks, Workload
from flashcp.sharding.shards import ShardTable

SWAPS = 8  # for each rank, to bring work back within the limit


def kept_blocks(masks: Masks, rank_rows: int) -> np.ndarray:
    """Blocks that no cut may fall into: those that fit on a rank and are not their whole document, bool [blocks]."""
    rows = masks.block_stop - masks.block_start
    return (rows <= rank_rows) & (rows < masks.length[masks.block_document])


def cut_blocks(masks: Masks, kept: np.ndarray, table: ShardTable) -> int:
    """How many cuts of a plan fall inside blocks that should be whole."""
    document, start, stop = masks.block_document[kept], masks.block_start[kept], masks.block_stop[kept]
    code = np.sort((table.document << 31) + table.start)
    inside = np.searchsorted(code, (document << 31) + stop) - np.searchsorted(code, (document << 31) + start + 1)
    return int(inside.sum())


def keep_blocks_whole(
    lengths: np.ndarray, world_size: int, table: ShardTable, limit: int, workload: Workload
) -> ShardTable:
    """Give each block to the rank that has most of it; then move rows outside blocks until ranks are equal again.

    Rows whose work evens out the two ranks go first, of documents that the taker reads anyhow. Last, dense rows are
    swapped for light ones while work is above the limit; that may fail: whole blocks come before balanced work. Where
    there are too few rows outside blocks to make ranks equal, the table comes back as it was.
    """
    masks = workload.masks
    kept = kept_blocks(masks, int(lengths.sum()) // world_size)
    if not cut_blocks(masks, kept, table):
        return table
    pieces, loose = _pieces(masks, kept, table)
    surplus = sum_by(pieces.rank, pieces.rows, world_size) - sum_by(table.rank, table.rows, world_size)
    work = sum_by(pieces.rank, workload.pairs(*pieces[:3]), world_size)

    def give(piece: int, rows: int, from_end: bool, taker: int) -> None:
        """Move rows of a piece to another rank."""
        nonlocal pieces, loose
        document, start, stop, giver = (int(column[piece]) for column in pieces)
        cut = stop - rows if from_end else start + rows
        first, past = (cut, stop) if from_end else (start, cut)
        left = (start, cut) if from_end else (cut, stop)
        new = ShardTable(*np.array([(document, first, past, taker), (document, *left, giver)]).T)
        pieces = ShardTable(*(np.append(np.delete(old, piece), more) for old, more in zip(pieces, new, strict=True)))
        loose = np.append(np.delete(loose, piece), [True, True])
        keep = pieces.rows > 0
        pieces, loose = pieces.take(keep), loose[keep]
        pairs = int(workload.pairs(*(np.array([x]) for x in (document, first, past)))[0])
        work[giver] -= pairs
        work[taker] += pairs

    while surplus.any():
        giver, taker = int(surplus.argmax()), int(surplus.argmin())
        wanted = int(min(surplus[giver], -surplus[taker]))
        mine = np.flatnonzero(loose & (pieces.rank == giver))
        if not len(mine):
            return table
        rows = np.minimum(pieces.rows[mine], wanted)
        document, start, stop = (column[mine] for column in pieces[:3])
        pairs = np.concatenate(
            (workload.pairs(document, start, start + rows), workload.pairs(document, stop - rows, stop))
        )
        reach = np.zeros(len(lengths), dtype=np.int64)
        takers = pieces.take(pieces.rank == taker)
        np.maximum.at(reach, takers.document, takers.stop)
        both, evens_out = np.tile(rows, 2), (work[giver] - work[taker]) / 2 / wanted
        read = np.tile(reach[document], 2) >= np.append(start + rows, stop)
        best = int(np.lexsort((np.abs(pairs / both - evens_out), ~read, -both))[0])
        moved = int(both[best])
        give(int(mine[best % len(mine)]), moved, best >= len(mine), taker)
        surplus[giver] -= moved
        surplus[taker] += moved

    for _ in range(SWAPS * world_size):
        giver, taker = int(work.argmax()), int(work.argmin())
        over = int(min(work[giver] - limit, limit - work[taker]))
        density = workload.pairs(*pieces[:3]) / pieces.rows
        mine, theirs = (np.flatnonzero(loose & (pieces.rank == rank)) for rank in (giver, taker))
        if over <= 0 or not len(mine) or not len(theirs):
            break
        dense, light = int(mine[density[mine].argmax()]), int(theirs[density[theirs].argmin()])
        gain = density[dense] - density[light]
        if gain < 1:
            break
        moved = int(min(pieces.rows[dense], pieces.rows[light], max(over // gain, 1)))
        before, busiest = (pieces, loose, work.copy()), int(work.max())
        light_piece = [column[light] for column in pieces]
        give(dense, moved, True, taker)
        light = int(np.flatnonzero(np.all([c == x for c, x in zip(pieces, light_piece, strict=True)], axis=0))[0])
        give(light, moved, False, giver)
        if max(work[giver], work[taker]) >= busiest:
            pieces, loose, work = before
            break
    return pieces


def _pieces(masks: Masks, kept: np.ndarray, table: ShardTable) -> tuple[ShardTable, np.ndarray]:
    """The table with cuts at the ends of all kept blocks, each of them on one rank; and which pieces are no blocks."""
    document, start, stop = masks.block_document[kept], masks.block_start[kept], masks.block_stop[kept]
    edges = np.unique(np.concatenate(((table.document << 31) + table.start, *((document << 31) + start,))))
    edges = np.union1d(edges, ((document << 31) + stop)[stop < masks.length[document]])
    owner = np.argsort((table.document << 31) + table.start, kind="stable")
    at = owner[np.searchsorted(((table.document << 31) + table.start)[owner], edges, side="right") - 1]
    of, first = edges >> 31, edges & (2**31 - 1)
    past = np.where(np.append(of[1:] == of[:-1], False), np.append(first[1:], 0), masks.length[of])
    block = np.searchsorted((document << 31) + start, edges, side="right") - 1
    inside = (block >= 0) & (document[block] == of) & (first < stop[block]) if len(document) else block >= 0
    loose = ShardTable(of, first, past, table.rank[at]).take(~inside)
    parts, rows, rank = block[inside], (past - first)[inside], table.rank[at][inside]
    most = np.lexsort((rank, rows, parts))  # the last one of each block has most of it
    last = most[np.append(parts[most][1:] != parts[most][:-1], True)] if len(most) else most
    whole = parts[last]
    blocks = ShardTable(document[whole], start[whole], stop[whole], rank[last])
    joined = ShardTable(*(np.concatenate(columns) for columns in zip(loose, blocks, strict=True)))
    return joined, np.arange(len(joined.rank)) < len(loose.rank)
