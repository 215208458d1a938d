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

from flashcp.kernels import tiles

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
RECEIVED = tl.constexpr(tiles.RECEIVED)
OWN = tl.constexpr(tiles.OWN)
COLUMNS = tl.constexpr(tiles.TILE_COLUMNS)
RANGE_COLUMNS = tl.constexpr(tiles.RANGE_COLUMNS)


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
def key_range(
    entry, k, v, k_received, v_received, k_row, k_head, v_row, v_head, kr_row, kr_head, vr_row, vr_head,
    kv_head, row, stop, rows, lowest_key, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The keys that a range of a query tile stands for, and which of them each row [M] of the tile sees.

    (k, v: pointers to row 0; their strides; start, full: blocks of keys that all rows see; end: of the masked keys
    behind; first and last key of each row [M]). stop: where the tile's own rows end.
    """
    kind = tl.load(entry)
    start = tl.load(entry + 1)
    seen_by_all = tl.where(kind == OWN, row, tl.load(entry + 2))
    end = tl.where(kind == OWN, stop, seen_by_all)
    full = start + (seen_by_all - start) // BLOCK_N * BLOCK_N
    received = kind == RECEIVED
    row_k = tl.where(received, kr_row, k_row)
    row_v = tl.where(received, vr_row, v_row)
    k_at = place(tl.where(received, k_received, k), 0, 0, kv_head, tl.where(received, kr_head, k_head))
    v_at = place(tl.where(received, v_received, v), 0, 0, kv_head, tl.where(received, vr_head, v_head))
    first_key = tl.where(kind == OWN, lowest_key, 0)  # [M]
    last_key = tl.where(kind == OWN, rows, end - 1)  # [M]
    return k_at, v_at, row_k, row_v, start, full, end, first_key, last_key


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
