"""What the attention kernels share: tiles of rows, where a range of keys lies, how far a query row sees.

Shapes: M query rows, N key rows, D head_dim widened to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashcp.kernels import tiles

__all__ = ["LN2", "LOG2E", "OWN", "RECEIVED", "load_rows", "load_tile", "place", "store_rows"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
RECEIVED = tl.constexpr(tiles.RECEIVED)
OWN = tl.constexpr(tiles.OWN)


@triton.jit
def place(tensor, row, stride_row, head, stride_head):
    """Pointer to one row of one head; 64-bit, for 1M rows of 32 x 128 elements pass 2^31."""
    return tensor + tl.cast(row, tl.int64) * stride_row + tl.cast(head, tl.int64) * stride_head


@triton.jit
def load_rows(pointer, stride_row, rows_left, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
              BOUNDED: tl.constexpr):  # fmt: skip
    """[ROWS, BLOCK_D] from `pointer` on; zeros beyond HEAD_DIM and, when BOUNDED, from row `rows_left` on."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    pointers = pointer + (row * stride_row + column)
    if BOUNDED:
        if HEAD_DIM == BLOCK_D:
            return tl.load(pointers, mask=row < rows_left, other=0.0)
        return tl.load(pointers, mask=(row < rows_left) & (column < HEAD_DIM), other=0.0)
    if HEAD_DIM == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=column < HEAD_DIM, other=0.0)


@triton.jit
def store_rows(pointer, stride_row, rows_left, value, HEAD_DIM: tl.constexpr):
    """Store [ROWS, BLOCK_D] at `pointer`, leaving out rows from `rows_left` on."""
    row = tl.arange(0, value.shape[0])[:, None]
    column = tl.arange(0, value.shape[1])[None, :]
    pointers = pointer + (row * stride_row + column)
    mask = (row < rows_left) & (column < HEAD_DIM)
    tl.store(pointers, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_tile(table, index, AGAIN: tl.constexpr = False):
    """A row of a tile table: (received, row, stop, range_first, range_stop). AGAIN: from memory, whatever is known."""
    entry = table + 5 * index
    return (tl.load(entry, volatile=AGAIN), tl.load(entry + 1, volatile=AGAIN), tl.load(entry + 2, volatile=AGAIN),
            tl.load(entry + 3, volatile=AGAIN), tl.load(entry + 4, volatile=AGAIN))  # fmt: skip
