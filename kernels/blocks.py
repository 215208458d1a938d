"""What the attention kernels share: tiles of rows, where a range of keys lies, how far a query row sees.

Short documents may share a tile. The mask gives what a row does not see a weight of 0, and 0 times NaN is NaN: so a
tile of several documents in whose sums a NaN turns up is not stored. The program notes the tile in `mixed`, and a
second launch (APART) does the noted tiles again, document by document, with zeros for the rows of all others. Sums of
other documents then hold the same numbers in the same order, bit for bit (but for the forward on Hopper, whose tiles
this kernel does again in its own order). Without a NaN the second launch ends at once.

Shapes: M query rows, N key rows, W the width of a part of head_dim (`kernels/parts.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashcp.kernels import intervals, tiles

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
RECEIVED = tl.constexpr(tiles.RECEIVED)
OWN = tl.constexpr(tiles.OWN)
COLUMNS = tl.constexpr(tiles.TILE_COLUMNS)
RANGE_COLUMNS = tl.constexpr(tiles.RANGE_COLUMNS)
SHIFTED_COLUMNS = tl.constexpr(intervals.RANGE_COLUMNS)
REACH_COLUMNS = tl.constexpr(intervals.REACH_COLUMNS)


@triton.jit
def place(tensor, row, stride_row, head, stride_head):
    """Pointer to one row of one head; 64-bit, for 1M rows of 32 x 128 elements pass 2^31."""
    return tensor + tl.cast(row, tl.int64) * stride_row + tl.cast(head, tl.int64) * stride_head


@triton.jit
def load_tile(table, index, AGAIN: tl.constexpr = False):
    """A row of a tile table: (received, row, stop, range_first, range_stop). AGAIN: from memory, whatever is known."""
    entry = table + COLUMNS * index
    return (tl.load(entry, volatile=AGAIN), tl.load(entry + 1, volatile=AGAIN), tl.load(entry + 2, volatile=AGAIN),
            tl.load(entry + 3, volatile=AGAIN), tl.load(entry + 4, volatile=AGAIN))  # fmt: skip


@triton.jit
def range_entry(ranges, index, INTERVALS: tl.constexpr):
    """Pointer to a row of a table of ranges."""
    if INTERVALS:
        return ranges + SHIFTED_COLUMNS * index
    else:
        return ranges + RANGE_COLUMNS * index


@triton.jit
def own_end(reach, row, INTERVALS: tl.constexpr, BEFORE: tl.constexpr = False):
    """Where the document of a row (BEFORE: of the row before) begins (query tiles) or ends (key tiles), if the row
    shares its tile with other documents."""
    if INTERVALS:
        return tl.load(reach + REACH_COLUMNS * (row - BEFORE) + 2)
    else:
        if BEFORE:
            return tl.load(reach + row - 1)
        else:
            return tl.load(reach + row)


@triton.jit
def row_bounds(reach, row, stop, rows, INTERVALS: tl.constexpr):
    """What rows [M] of a query tile see, for `key_range`: where each one's own run begins. INTERVALS: where each one's
    interval begins and ends, those of the first row and those of the last."""
    if INTERVALS:
        of_row = reach + REACH_COLUMNS * rows
        first, last = reach + REACH_COLUMNS * row, reach + REACH_COLUMNS * (stop - 1)
        return (tl.load(of_row, mask=rows < stop, other=0), tl.load(of_row + 1, mask=rows < stop, other=0),
                tl.load(first), tl.load(first + 1), tl.load(last), tl.load(last + 1))  # fmt: skip
    else:
        return (tl.load(reach + rows, mask=rows < stop, other=0),)


@triton.jit
def key_range(
    entry, k, v, k_received, v_received, k_row, k_head, v_row, v_head, kr_row, kr_head, vr_row, vr_head,
    kv_head, row, first, stop, rows, bounds, BLOCK_N: tl.constexpr, INTERVALS: tl.constexpr,
):  # fmt: skip
    """The keys that a range of a query tile stands for, and which of them each row [M] of the tile sees.

    (k, v: pointers to row 0; their strides; start, full: blocks of keys that all rows see; edge, gap: see `skip_full`;
    end: of the masked keys behind; first and last key of each row [M]). stop: where the tile's own rows end. first:
    not None where that is where one of several documents ends.
    """
    kind = tl.load(entry)
    start = tl.load(entry + 1)
    if INTERVALS:
        lowest_key, past_key, first_low, first_past, last_low, last_past = bounds
        shift = tl.load(entry + 4)
        begin = tl.maximum(start, first_low - shift)
        end = tl.minimum(tl.load(entry + 2), last_past - shift)
        if first is not None:
            end = tl.minimum(end, stop)
        start = begin + tl.cdiv(tl.maximum(last_low - shift - begin, 0), BLOCK_N) * BLOCK_N
        full = start + tl.maximum(tl.minimum(first_past - shift, end) - start, 0) // BLOCK_N * BLOCK_N
        gap = full - start
        edge = begin + gap
    else:
        seen_by_all = tl.where(kind == OWN, row, tl.load(entry + 2))
        end = tl.where(kind == OWN, stop, seen_by_all)
        full = start + (seen_by_all - start) // BLOCK_N * BLOCK_N
        gap, edge = 0, full
    received = kind == RECEIVED
    row_k = tl.where(received, kr_row, k_row)
    row_v = tl.where(received, vr_row, v_row)
    k_at = place(tl.where(received, k_received, k), 0, 0, kv_head, tl.where(received, kr_head, k_head))
    v_at = place(tl.where(received, v_received, v), 0, 0, kv_head, tl.where(received, vr_head, v_head))
    if INTERVALS:
        first_key = lowest_key - shift  # [M]
        last_key = tl.minimum(past_key - shift, end) - 1  # [M]; a row sees of other ranges too
    else:
        first_key = tl.where(kind == OWN, bounds[0], 0)  # [M]
        last_key = tl.where(kind == OWN, rows, end - 1)  # [M]
    return k_at, v_at, row_k, row_v, start, full, edge, gap, end, first_key, last_key


@triton.jit
def skip_full(n, full, gap, INTERVALS: tl.constexpr):
    """Where block n of a masked loop lies. Blocks that some rows see in part lie before and behind those that all see:
    one loop takes both, those before as if they lay `gap` rows further on, next to the others."""
    if INTERVALS:
        return n - tl.where(n < full, gap, 0)
    else:
        return n


@triton.jit
def squash(scores, soften):
    """Softcap: the hyperbolic tangent of products whose `soften` is 2 log2(e) scale / cap; it never overflows."""
    return 1.0 - 2.0 / (tl.exp2(scores * soften) + 1.0)


@triton.jit
def product_scale(scale, soften):
    """What the products of queries and keys are multiplied by, before the softcap, from the numbers a kernel takes."""
    if soften is None:
        return scale / LOG2E
    else:
        return soften * scale / (2.0 * LOG2E * LOG2E)


@triton.jit
def note_mixed(mixed, tile, head, heads, sums):
    """Note that a tile of several documents is to be done again, if one of its rows' sums [rows] over all columns is
    NaN: then the row holds a NaN, or infinities of both signs. One addition a number tells."""
    spoilt = sums != sums
    nowhere = tl.zeros_like(spoilt).to(tl.int32)
    tl.store(mixed + nowhere, 1, mask=spoilt)
    tl.store(mixed + 1 + tile * heads + head + nowhere, 1, mask=spoilt)


@triton.jit
def is_mixed(mixed, tile, head, heads):
    """Whether the first launch noted this tile."""
    return tl.load(mixed + 1 + tile * heads + head) != 0
