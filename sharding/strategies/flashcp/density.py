"""How many pairs the rows of a document have in all layers together, for the loops of `flashcp`.

All of it runs as it stands, or compiled by numba: whole numbers only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from flashcp.sharding.masks import Workload
from flashcp.sharding.strategies.flashcp.blocks import kept_blocks

STEPS = 12  # at most, to find a tail: lines and kinks take two or three


class Density(NamedTuple):
    """Work of documents under masks and a layer mix, int64.

    Few arrays: the loops hand them on by value. Inside a block work grows by the row: exact for blocks from a
    document's start and for layers that look back to there, close for the others.
    """

    layers: np.ndarray  # [kinds] how many
    document: np.ndarray  # [documents, 7 + 2 kinds]: PREFIX ... LESS, then window and chunk of each kind
    block: np.ndarray  # [blocks, 7]: START, STOP, BELOW, ROW, REST, ADDED, KEPT


PREFIX = 0  # rows of the block from the document's start
FIRST, PAST = 1, 2  # the document's blocks
PLAIN = 3  # rows from which on, outside blocks, layers are of two sorts, WHOLE (see all) and others (a window)
WHOLE, WIDE, LESS = 4, 5, 6  # how many see all; all windows of the others; what their first rows have less than that
SIZES = 7  # window (beyond the document where there is none) and chunk (0 where there is none) of each kind

START, STOP = 0, 1  # rows of a block
BELOW = 2  # pairs of the rows before it
ROW, REST = 3, 4  # pairs of each of its rows, and what this leaves over
ADDED = 5  # pairs that it and those before it add to the rows
KEPT = 6  # 1 where no cut may fall inside


def density_of(workload: Workload, documents: np.ndarray, rank_rows: int) -> Density:
    """The density of some documents, in that order. Blocks of more than `rank_rows`, or of all rows, may be cut."""
    kinds = [(masks.take(documents), count) for masks, count in workload.kinds]
    masks = workload.masks.take(documents)
    document, start, stop = masks.block_document, masks.block_start, masks.block_stop
    columns = np.zeros((len(documents), SIZES + 2 * len(kinds)), dtype=np.int64)
    chunks = np.zeros(len(documents), dtype=bool)
    columns[document[start == 0], PREFIX] = stop[start == 0]
    first = np.searchsorted(document, np.arange(len(documents) + 1))
    columns[:, FIRST], columns[:, PAST] = first[:-1], first[1:]
    blocks = np.zeros((len(start), KEPT + 1), dtype=np.int64)
    beyond = blocks[:, 0].copy()
    for i, (kind, count) in enumerate(kinds):
        columns[:, SIZES + 2 * i] = np.where(kind.window > 0, kind.window, kind.length + 1)
        columns[:, SIZES + 2 * i + 1] = kind.chunk
        chunks |= kind.chunk > 0
        columns[:, PLAIN] = np.maximum(columns[:, PLAIN], kind.window)
        columns[:, WHOLE] += count * (kind.window == 0)
        columns[:, WIDE] += count * kind.window
        columns[:, LESS] += count * (kind.window * (kind.window - 1) // 2)
        plain = replace(kind, block_document=start[:0], block_start=start[:0], block_stop=start[:0])
        blocks[:, BELOW] += count * kind.pairs_below(document, start)
        beyond += count * kind.pairs_below(document, stop)
        blocks[:, ADDED] -= count * plain.pairs_below(document, stop)
    columns[chunks, PLAIN] = masks.length[chunks] + 1
    blocks[:, START], blocks[:, STOP] = start, stop
    blocks[:, ROW], blocks[:, REST] = np.divmod(beyond - blocks[:, BELOW], stop - start)
    blocks[:, ADDED] += beyond
    blocks[:, KEPT] = kept_blocks(masks, rank_rows)
    return Density(np.array([count for _, count in kinds], dtype=np.int64), columns, blocks)


def block_before(density: Density, document: int, row: int) -> int:
    """The last block of a document that begins at the row or before it, -1 if there is none."""
    low, high = density.document[document, FIRST], density.document[document, PAST]
    first = low
    while low < high:
        middle = (low + high) // 2
        if density.block[middle, START] <= row:
            low = middle + 1
        else:
            high = middle
    return low - 1 if low > first else -1


def below(density: Density, document: int, row: int) -> int:
    """Pairs of the rows of a document below `row`."""
    pairs = 0
    if density.document[document, FIRST] < density.document[document, PAST]:
        block = block_before(density, document, row)
        if block >= 0:
            start, stop = density.block[block, START], density.block[block, STOP]
            if row < stop:
                rows = row - start
                pairs = density.block[block, BELOW] + rows * density.block[block, ROW]
                return pairs + rows * density.block[block, REST] // (stop - start)
            pairs = density.block[block, ADDED]
    if row >= density.document[document, PLAIN]:
        pairs += density.document[document, WHOLE] * (row * (row + 1) // 2)
        return pairs + density.document[document, WIDE] * row - density.document[document, LESS]
    for kind in range(len(density.layers)):
        window, chunk = density.document[document, SIZES + 2 * kind], density.document[document, SIZES + 2 * kind + 1]
        rows, count = row, 0
        if chunk > 0:
            full = min(chunk, window)
            count = row // chunk * (full * (full + 1) // 2 + (chunk - full) * full)
            rows = row % chunk
        full = min(rows, window)
        pairs += density.layers[kind] * (count + full * (full + 1) // 2 + (rows - full) * full)
    return pairs


def split(
    density: Density, document: int, low: int, high: int, rows: int, work: int, below_low: int, below_high: int
) -> int:
    """Of `rows` rows from both ends of [low, high), how many from the end, so that their pairs come next to `work`.

    below_low, below_high: pairs below the two.

    Where work grows by equal steps from row to row, one division finds it; where not, each division halves at least
    what is left of the rows. Where it does not grow at all, all come from one end.
    """
    fewer, more = 0, rows  # tails with less work than wanted, and with more
    less = below(density, document, low + rows) - below_low
    most = below_high - below(density, document, high - rows)
    base = below_high - below_low
    if less > most:
        fewer, more, less, most = more, fewer, most, less
    if work >= most:
        return more
    if work <= less:
        return fewer
    for step in range(STEPS):
        gap = abs(more - fewer)
        slope = (most - less) // gap
        if gap == 1:
            break
        move = gap // 2
        if step % 3 != 2:
            move = min(max((work - less + slope // 2) // max(slope, 1), 1), gap - 1)
        tail = fewer + move if more > fewer else fewer - move
        pairs = base + below(density, document, low + rows - tail) - below(density, document, high - tail)
        if 2 * abs(pairs - work) <= slope:
            return tail
        if pairs <= work:
            fewer, less = tail, pairs
        else:
            more, most = tail, pairs
    return fewer if work - less <= most - work else more


def snap(density: Density, document: int, high: int, rows: int, tail: int) -> int:
    """The tail next to `tail` that begins in no block that is kept whole; `tail` if there is none."""
    cut = high - tail
    block = block_before(density, document, cut)
    if block < 0 or density.block[block, KEPT] == 0 or cut == density.block[block, START]:
        return tail
    if cut >= density.block[block, STOP]:
        return tail
    start, stop = high - density.block[block, START], high - density.block[block, STOP]  # tails that begin there
    nearer, other = (start, stop) if start - tail <= tail - stop else (stop, start)
    for each in (nearer, other):
        if 0 <= each <= rows:
            return each
    return tail


HELPERS = (block_before, below, split, snap)
"""What `split` and others call."""
