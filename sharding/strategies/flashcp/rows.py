"""The last step for a few rows a rank: where pieces are too coarse to balance, exchange single rows."""

from __future__ import annotations

import numpy as np

from flashcp.sharding.documents import document_offsets, expand_ranges, sum_by
from flashcp.sharding.masks import Workload
from flashcp.sharding.shards import ShardTable


def exchange_rows(
    lengths: np.ndarray, world_size: int, table: ShardTable, limit: int, workload: Workload
) -> ShardTable:
    """Swap rows of the rank with most work against lighter rows of others until all are within the limit.

    Rows that both ranks read anyhow come first: such a swap adds nothing to what they receive. Stops where no swap
    helps. Costs world_size * (rows a rank) ** 2 comparisons a swap.
    """
    offsets = document_offsets(lengths)
    owner = np.empty(offsets[-1], dtype=np.int64)
    owner[expand_ranges(offsets[table.document] + table.start, table.rows)] = np.repeat(table.rank, table.rows)
    document = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(offsets[-1]) - offsets[document]
    pairs = workload.pairs(document, position, position + 1)
    work = sum_by(owner, pairs, world_size)
    while work.max() > limit:
        giver = int(work.argmax())
        swap = _best_swap(owner, document, position, pairs, work, giver, limit)
        if swap is None:
            break
        mine, theirs, taker = swap
        gain = pairs[mine]
        owner[mine] = taker
        if theirs >= 0:
            owner[theirs] = giver
            gain -= pairs[theirs]
        work[giver] -= gain
        work[taker] += gain
    first = np.flatnonzero(np.append(True, (np.diff(owner) != 0) | (np.diff(document) != 0)))
    stop = np.append(first[1:], offsets[-1])
    start = first - offsets[document[first]]
    return ShardTable(document[first], start, stop - offsets[document[first]], owner[first])


def _best_swap(
    owner: np.ndarray,
    document: np.ndarray,
    position: np.ndarray,
    pairs: np.ndarray,
    work: np.ndarray,
    giver: int,
    limit: int,
) -> tuple[int, int, int] | None:
    """The rows (the giver's, another's) and the other rank whose swap takes most of what the giver has too much.

    Free ones first. Row -1 is none: a rank with one row more than the other may just give it away.
    """
    over = work[giver] - limit
    mine = np.flatnonzero(owner == giver)
    best: tuple[int, int, int] | None = None
    best_key = (0, 0, 0)
    for taker in np.argsort(work, kind="stable").tolist():
        if work[taker] >= limit:
            break
        theirs = np.flatnonzero(owner == taker)
        gain = pairs[mine][:, None] - pairs[theirs][None, :]
        same = document[mine][:, None] == document[theirs][None, :]
        reach = np.where(same, position[theirs], -1).max(axis=1, initial=-1)  # the last row it holds of each document
        if len(mine) > len(theirs):
            theirs = np.append(theirs, -1)
            gain = np.column_stack((gain, pairs[mine]))
            same = np.column_stack((same, np.full(len(mine), True)))
        # A row above the end of the other rank would make it read more.
        free = same & (position[mine] <= reach)[:, None]
        useful = np.where((gain > 0) & (gain <= limit - work[taker]), np.minimum(gain, over), 0)
        for is_free, value in ((1, np.where(free, useful, 0)), (0, useful)):
            at = int(value.argmax())
            amount = int(value.flat[at])
            key = (int(amount == over), is_free, amount)
            if amount > 0 and key > best_key:
                best_key = key
                best = int(mine[at // len(theirs)]), int(theirs[at % len(theirs)]), taker
        if best_key[:2] == (1, 1):
            break
    return best
