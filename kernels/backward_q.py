"""Backward: dQ of one query tile and one head, over the same tiles and ranges as the forward.

Every element is written by one program, sums run in a fixed order: two runs agree bit for bit.

Shapes: M query rows (BLOCK_M), N key rows (BLOCK_N), D head_dim widened to a power of two (BLOCK_D).
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashcp.kernels.blocks import LOG2E, OWN, RECEIVED, load_rows, load_tile, place, store_rows

__all__ = ["backward_q_kernel"]


@triton.jit
def backward_q_kernel(
    q, k, v, k_received, v_received, grad_out, log_sum, delta, grad_q, table, ranges, reach, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, kr_row, kr_head, vr_row, vr_head,
    grad_row, grad_head, head_rows, gq_row, gq_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile, query head)."""
    head = tl.program_id(1)
    _, row, stop, range_first, range_stop = load_tile(table, tl.program_id(0))
    rows = row + tl.arange(0, BLOCK_M)
    lowest_key = tl.load(reach + rows, mask=rows < stop, other=0)  # [M]
    q_tile = load_rows(place(q, row, q_row, head, q_head), q_row, stop - row, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    grad_at = place(grad_out, row, grad_row, head, grad_head)
    grad_tile = load_rows(grad_at, grad_row, stop - row, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    of_head = tl.cast(head, tl.int64) * head_rows
    log_sum_rows = tl.load(log_sum + of_head + rows, mask=rows < stop, other=float("inf"))
    delta_rows = tl.load(delta + of_head + rows, mask=rows < stop, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    for i in range(range_first, range_stop):
        kind = tl.load(ranges + 4 * i)
        start = tl.load(ranges + 4 * i + 1)
        seen_by_all = tl.where(kind == OWN, row, tl.load(ranges + 4 * i + 2))
        end = tl.where(kind == OWN, stop, seen_by_all)
        full = start + (seen_by_all - start) // BLOCK_N * BLOCK_N
        received = kind == RECEIVED
        kv_head = head // GROUP
        row_k = tl.where(received, kr_row, k_row)
        row_v = tl.where(received, vr_row, v_row)
        k_at = place(tl.where(received, k_received, k), 0, 0, kv_head, tl.where(received, kr_head, k_head))
        v_at = place(tl.where(received, v_received, v), 0, 0, kv_head, tl.where(received, vr_head, v_head))
        first_key = tl.where(kind == OWN, lowest_key, 0)  # [M]
        last_key = tl.where(kind == OWN, rows, end - 1)  # [M]
        acc = _gather(
            acc, q_tile, grad_tile, log_sum_rows, delta_rows, k_at, v_at, row_k, row_v, start, full, end, first_key,
            last_key, scale, HEAD_DIM, BLOCK_D, BLOCK_N, False, PRECISION,
        )  # fmt: skip
        acc = _gather(
            acc, q_tile, grad_tile, log_sum_rows, delta_rows, k_at, v_at, row_k, row_v, full, end, end, first_key,
            last_key, scale, HEAD_DIM, BLOCK_D, BLOCK_N, True, PRECISION,
        )  # fmt: skip
    gradient = acc * (scale / LOG2E)
    store_rows(place(grad_q, row, gq_row, head, gq_head), gq_row, stop - row, gradient, HEAD_DIM)


@triton.jit
def _gather(
    acc, q_tile, grad_tile, log_sum_rows, delta_rows, k_at, v_at, row_k, row_v, start, stop, end, first_key, last_key,
    scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Blocks of keys from `start` below `stop`; MASKED: only first_key <= key <= last_key count, rows end at `end`."""
    for n in range(start, stop, BLOCK_N):
        k_tile = load_rows(place(k_at, n, row_k, 0, 0), row_k, end - n, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
        v_tile = load_rows(place(v_at, n, row_v, 0, 0), row_v, end - n, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)  # [M, N]
        if MASKED:
            key = (n + tl.arange(0, BLOCK_N))[None, :]
            scores = tl.where((key >= first_key[:, None]) & (key <= last_key[:, None]), scores, float("-inf"))
        weights = tl.exp2((scores - log_sum_rows[:, None]) * scale)
        pull = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION)  # [M, N]
        grad_scores = weights * (pull - delta_rows[:, None])
        acc = tl.dot(grad_scores.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    return acc
