"""Rows of K and V that leave a rank, side by side in the order in which they leave: one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashcp.kernels.blocks import place

BLOCK_ROWS, WARPS = 32, 4


def pack_rows(k: Tensor, v: Tensor, index: Tensor) -> Tensor:
    """[rows, 2, heads, D]: rows `index`, int64, of k and v [T, heads, D], whose elements along D are consecutive."""
    rows, (_, heads, head_dim) = len(index), k.shape
    packed = k.new_empty((rows, 2, heads, head_dim))
    if rows:
        strides = (*k.stride()[:2], *v.stride()[:2])
        with torch.cuda.device_of(k):
            pack_rows_kernel[(triton.cdiv(rows, BLOCK_ROWS), heads)](
                k, v, index, packed, rows, *strides, packed.stride(0), packed.stride(1),
                HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_ROWS=BLOCK_ROWS, num_warps=WARPS,
            )  # fmt: skip
    return packed


@triton.jit(do_not_specialize=["count"])
def pack_rows_kernel(
    k, v, index, packed, count, k_row, k_head, v_row, v_head, packed_row, packed_half,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, head)."""
    head = tl.program_id(1)
    entry = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    present = entry < count
    row = tl.load(index + entry, mask=present, other=0)[:, None]  # [BLOCK_ROWS, 1], int64
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = present[:, None] & (column < HEAD_DIM)
    into = packed + entry.to(tl.int64)[:, None] * packed_row + head * HEAD_DIM + column
    k_rows = tl.load(place(k, 0, k_row, head, k_head) + row * k_row + column, mask=mask)
    v_rows = tl.load(place(v, 0, v_row, head, v_head) + row * v_row + column, mask=mask)
    tl.store(into, k_rows, mask=mask)
    tl.store(into + packed_half, v_rows, mask=mask)
