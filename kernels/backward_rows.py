"""Backward, before all else: the two numbers per query row and head that both gradient kernels need.

Shapes: M query rows (BLOCK_M), W the width of a part of head_dim (`kernels/parts.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashcp.kernels.blocks import LOG2E, place
from flashcp.kernels.parts import load_rows

ROWS = 32
"""Rows of a block: the kernel only reads and adds up, so one size serves all."""


@triton.jit(do_not_specialize=["rows"])
def backward_rows_kernel(
    out, grad_out, lse, log_sum, minus_delta, rows,
    out_row, out_head, grad_row, grad_head, lse_row, head_rows,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, INTERVALS: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, query head): minus_delta = -sum(out * grad_out) and log_sum = lse * log2(e), both fp32
    [heads, head_rows], as the products need them. Rows that read nothing lie in no tile, and nobody asks for theirs;
    INTERVALS: they may lie in one beside others, and infinity makes their weights 0."""
    row, head = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    out_at = place(out, row, out_row, head, out_head)
    grad_at = place(grad_out, row, grad_row, head, grad_head)
    out_tile = load_rows(out_at, out_row, rows - row, BLOCK_M, HEAD_DIM, True)
    grad_tile = load_rows(grad_at, grad_row, rows - row, BLOCK_M, HEAD_DIM, True)
    delta = tl.sum(out_tile[0].to(tl.float32) * grad_tile[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(out_tile)):
        delta += tl.sum(out_tile[i].to(tl.float32) * grad_tile[i].to(tl.float32), 1)
    at = row + tl.arange(0, BLOCK_M)
    lse_rows = tl.load(lse + at.to(tl.int64) * lse_row + head, mask=at < rows, other=0.0)
    if INTERVALS:
        lse_rows = tl.where(lse_rows == float("-inf"), float("inf"), lse_rows)
    into = tl.cast(head, tl.int64) * head_rows + at
    tl.store(log_sum + into, lse_rows * LOG2E, mask=at < rows)
    tl.store(minus_delta + into, -delta, mask=at < rows)
