"""Rows of head_dim columns as the tensor cores take them: one part, or two where a power of two would waste columns.

Tensor cores multiply blocks whose sides are powers of two. A head_dim of 80 as one block computes 128 columns, as parts
of 64 and 16 it computes 80. A tensor of rows is a tuple of its parts; the loops over parts are unrolled.

A query tile may hold TILE_HEADS heads that share their KV head: row i of the tile is row i // TILE_HEADS of head
i % TILE_HEADS, counted from the tile's first.

Shapes: M rows of a tile, N others, W the width of a part.
"""

# Triton knows no (*parts, part), and a tuple of parts grows while a loop is unrolled.
# ruff: noqa: RUF005
# mypy: disable-error-code=assignment

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def _padded(columns):
    """The power of two, 16 at least, that one part for so many columns takes."""
    return max(16, 1 << (columns - 1).bit_length())


@triton.constexpr_function
def part_widths(head_dim):
    """Widths of the parts: (64, 16) for 80, (64, 32) for 96, (128,) for 128 and for 120."""
    first = 1 << (head_dim.bit_length() - 1)
    if first >= 16 and first < head_dim and first + _padded(head_dim - first) < _padded(head_dim):
        return (first, _padded(head_dim - first))
    return (_padded(head_dim),)


@triton.constexpr_function
def _begin(widths, part):
    """Column where a part begins."""
    return sum(widths[:part])


@triton.constexpr_function
def _is_filled(widths, head_dim):
    return sum(widths) == head_dim


@triton.jit
def _rows(ROWS: tl.constexpr, stride_row, stride_head, TILE_HEADS: tl.constexpr):
    """The row [ROWS, 1] that each row of a tile is, counted from the tile's first, and where it lies."""
    row = tl.arange(0, ROWS)[:, None]
    offset = row * stride_row
    if TILE_HEADS > 1:
        offset = row // TILE_HEADS * stride_row + row % TILE_HEADS * stride_head
        row = row // TILE_HEADS
    return row, offset


@triton.jit
def load_rows(pointer, stride_row, rows_left, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BOUNDED: tl.constexpr,
              first=None, stride_head=None, TILE_HEADS: tl.constexpr = 1):  # fmt: skip
    """Parts [ROWS, W] from `pointer` on; zeros beyond HEAD_DIM and, when BOUNDED, below row `first` (None: 0) and from
    row `rows_left` on. stride_head: between the heads of a tile of several."""
    WIDTHS: tl.constexpr = part_widths(HEAD_DIM)
    row, offset = _rows(ROWS, stride_row, stride_head, TILE_HEADS)
    parts = ()
    for i in tl.static_range(len(WIDTHS)):
        column = _begin(WIDTHS, i) + tl.arange(0, WIDTHS[i])[None, :]
        pointers = pointer + (offset + column)
        if BOUNDED:
            there = row < rows_left
            if first is not None:
                there &= row >= first
            if _is_filled(WIDTHS, HEAD_DIM):
                parts = parts + (tl.load(pointers, mask=there, other=0.0),)
            else:
                parts = parts + (tl.load(pointers, mask=there & (column < HEAD_DIM), other=0.0),)
        else:
            if _is_filled(WIDTHS, HEAD_DIM):
                parts = parts + (tl.load(pointers),)
            else:
                parts = parts + (tl.load(pointers, mask=column < HEAD_DIM, other=0.0),)
    return parts


@triton.jit
def store_rows(pointer, stride_row, rows_left, parts, HEAD_DIM: tl.constexpr, first=None, stride_head=None,
               TILE_HEADS: tl.constexpr = 1):  # fmt: skip
    """Store parts [M, W] at `pointer`, leaving out rows below `first` (None: 0) and from `rows_left` on."""
    WIDTHS: tl.constexpr = part_widths(HEAD_DIM)
    row, offset = _rows(parts[0].shape[0], stride_row, stride_head, TILE_HEADS)
    there = row < rows_left
    if first is not None:
        there &= row >= first
    for i in tl.static_range(len(WIDTHS)):
        column = _begin(WIDTHS, i) + tl.arange(0, WIDTHS[i])[None, :]
        tl.store(pointer + (offset + column), parts[i].to(pointer.dtype.element_ty), mask=there & (column < HEAD_DIM))


@triton.jit
def zero_rows(ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Parts [ROWS, W] of zeros in fp32."""
    WIDTHS: tl.constexpr = part_widths(HEAD_DIM)
    parts = ()
    for i in tl.static_range(len(WIDTHS)):
        parts = parts + (_zeros(ROWS, WIDTHS[i]),)
    return parts


@triton.jit
def _zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros([ROWS, WIDTH], tl.float32)


@triton.jit
def rows_dot(a, b, start, PRECISION: tl.constexpr):
    """Products of each row of a [M, W] with each row of b [N, W], summed over all columns: [M, N], on top of `start`
    (None: 0)."""
    if start is None:
        sums = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    else:
        sums = tl.dot(a[0], tl.trans(b[0]), start, input_precision=PRECISION)
    for i in tl.static_range(1, len(a)):
        sums = tl.dot(a[i], tl.trans(b[i]), sums, input_precision=PRECISION)
    return sums


@triton.jit
def outer(weights, b, acc, PRECISION: tl.constexpr):
    """weights [M, N] times the rows b [N, W], on top of acc [M, W]; weights are rounded to b's dtype."""
    rounded = weights.to(b[0].dtype)
    parts = ()
    for i in tl.static_range(len(b)):
        parts = parts + (tl.dot(rounded, b[i], acc[i], input_precision=PRECISION),)
    return parts


@triton.jit
def times(parts, factor):
    """Parts [M, W] times a number, or [M, 1] for each row."""
    scaled = ()
    for i in tl.static_range(len(parts)):
        scaled = scaled + (parts[i] * factor,)
    return scaled


@triton.jit
def sum_columns(parts):
    """Sum of each row over all columns, [M]."""
    sums = tl.sum(parts[0], 1)
    for i in tl.static_range(1, len(parts)):
        sums += tl.sum(parts[i], 1)
    return sums
