"""Backward: dQ of one query tile and one head, over the same tiles and ranges as the forward.

Every element is written by one program, sums run in a fixed order: two runs agree bit for bit.

Shapes: M query rows (BLOCK_M), N key rows (BLOCK_N), W the width of a part of head_dim (`kernels/parts.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashcp.kernels.blocks import (
    is_mixed,
    key_range,
    load_tile,
    note_mixed,
    own_end,
    place,
    product_scale,
    range_entry,
    row_bounds,
    skip_full,
    squash,
)
from flashcp.kernels.parts import load_rows, outer, rows_dot, store_rows, sum_columns, times, zero_rows


@triton.jit(do_not_specialize=["tiles", "heads"])
def backward_q_kernel(
    q, k, v, k_received, v_received, grad_out, log_sum, minus_delta, grad_q, table, ranges, reach, mixed, scale, soften,
    q_row, q_head, k_row, k_head, v_row, v_head, kr_row, kr_head, vr_row, vr_head,
    grad_row, grad_head, head_rows, gq_row, gq_head, tiles, heads,
    GROUP: tl.constexpr, TILE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, APART: tl.constexpr, INTERVALS: tl.constexpr,
):  # fmt: skip
    """Program (tile, TILE_HEADS query heads of one KV head). APART: the second launch that `kernels/blocks.py` speaks
    of, by a few programs."""
    if APART:
        for work in range(tl.program_id(0), tiles * (heads // TILE_HEADS) * tl.load(mixed), tl.num_programs(0)):
            tile, head = work % tiles, work // tiles * TILE_HEADS
            if is_mixed(mixed, tile, head, heads):
                _, row, stop, range_first, range_stop = load_tile(table, tile)
                past = stop
                while past > row:
                    first = own_end(reach, past, INTERVALS, True)
                    acc = _sums(
                        q, k, v, k_received, v_received, grad_out, log_sum, minus_delta, ranges, reach, scale, soften,
                        q_row, q_head, k_row, k_head, v_row, v_head, kr_row, kr_head, vr_row, vr_head,
                        grad_row, grad_head, head_rows, row, stop, range_first, range_stop, first, past, head,
                        GROUP, TILE_HEADS, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_N, PRECISION, INTERVALS,
                    )  # fmt: skip
                    into = place(grad_q, row, gq_row, head, gq_head)
                    acc = times(acc, product_scale(scale, soften))
                    store_rows(into, gq_row, past - row, acc, HEAD_DIM, first - row, gq_head, TILE_HEADS)
                    past = first
    else:
        tile, head = tl.program_id(0), tl.program_id(1) * TILE_HEADS
        _, row, stop, range_first, range_stop = load_tile(table, tile)
        acc = _sums(
            q, k, v, k_received, v_received, grad_out, log_sum, minus_delta, ranges, reach, scale, soften,
            q_row, q_head, k_row, k_head, v_row, v_head, kr_row, kr_head, vr_row, vr_head,
            grad_row, grad_head, head_rows, row, stop, range_first, range_stop, None, stop, head,
            GROUP, TILE_HEADS, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_N, PRECISION, INTERVALS,
        )  # fmt: skip
        if own_end(reach, stop, INTERVALS, True) > row:  # several documents share the tile
            note_mixed(mixed, tile, head, heads, sum_columns(acc))
        into = place(grad_q, row, gq_row, head, gq_head)
        acc = times(acc, product_scale(scale, soften))
        store_rows(into, gq_row, stop - row, acc, HEAD_DIM, None, gq_head, TILE_HEADS)


@triton.jit
def _sums(
    q, k, v, k_received, v_received, grad_out, log_sum, minus_delta, ranges, reach, scale, soften,
    q_row, q_head, k_row, k_head, v_row, v_head, kr_row, kr_head, vr_row, vr_head,
    grad_row, grad_head, head_rows, row, stop, range_first, range_stop, first, past, head,
    GROUP: tl.constexpr, TILE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, INTERVALS: tl.constexpr,
):  # fmt: skip
    """Gradients of the scores times keys [M, D]; of its own rows the tile reads those from `first` (None: from where
    its ranges begin) below `past`."""
    i = tl.arange(0, BLOCK_M)
    rows = row + i // TILE_HEADS
    bounds = row_bounds(reach, row, stop, rows, INTERVALS)
    q_tile = load_rows(
        place(q, row, q_row, head, q_head), q_row, stop - row, BLOCK_M, HEAD_DIM, True, None, q_head, TILE_HEADS
    )
    grad_at = place(grad_out, row, grad_row, head, grad_head)
    grad_tile = load_rows(grad_at, grad_row, stop - row, BLOCK_M, V_DIM, True, None, grad_head, TILE_HEADS)
    of_head = (head + i % TILE_HEADS).to(tl.int64) * head_rows
    log_sum_rows = tl.load(log_sum + of_head + rows, mask=rows < stop, other=float("inf"))
    minus_delta_rows = tl.load(minus_delta + of_head + rows, mask=rows < stop, other=0.0)
    acc = zero_rows(BLOCK_M, HEAD_DIM)

    for i in range(range_first, range_stop):
        k_at, v_at, row_k, row_v, start, full, edge, gap, end, first_key, last_key = key_range(
            range_entry(ranges, i, INTERVALS), k, v, k_received, v_received,
            k_row, k_head, v_row, v_head, kr_row, kr_head, vr_row, vr_head,
            head // GROUP, row, first, past, rows, bounds, BLOCK_N, INTERVALS,
        )  # fmt: skip
        acc = _gather(
            acc, q_tile, grad_tile, log_sum_rows, minus_delta_rows, k_at, v_at, row_k, row_v,
            start, full, full, gap, first, end, first_key, last_key, scale, soften,
            HEAD_DIM, V_DIM, BLOCK_N, False, PRECISION, INTERVALS,
        )  # fmt: skip
        acc = _gather(
            acc, q_tile, grad_tile, log_sum_rows, minus_delta_rows, k_at, v_at, row_k, row_v,
            edge, end, full, gap, first, end, first_key, last_key, scale, soften,
            HEAD_DIM, V_DIM, BLOCK_N, True, PRECISION, INTERVALS,
        )  # fmt: skip
    return acc


@triton.jit
def _gather(
    acc, q_tile, grad_tile, log_sum_rows, minus_delta_rows, k_at, v_at, row_k, row_v, start, stop, full, gap,
    first, end, first_key, last_key, scale, soften,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, INTERVALS: tl.constexpr,
):  # fmt: skip
    """Blocks of keys from `start` below `stop`; MASKED: only first_key <= key <= last_key count, rows begin at
    `first` (None: at `start`) and end at `end`."""
    for block in range(start, stop, BLOCK_N):
        n = skip_full(block, full, gap, MASKED and INTERVALS)
        above = None
        if first is not None:
            above = first - n
        k_tile = load_rows(place(k_at, n, row_k, 0, 0), row_k, end - n, BLOCK_N, HEAD_DIM, MASKED, above)
        v_tile = load_rows(place(v_at, n, row_v, 0, 0), row_v, end - n, BLOCK_N, V_DIM, MASKED, above)
        scores = rows_dot(q_tile, k_tile, None, PRECISION)  # [M, N]
        if soften is not None:
            scores = squash(scores, soften)
            slope = 1.0 - scores * scores
        if MASKED:
            key = (n + tl.arange(0, BLOCK_N))[None, :]
            scores = tl.where((key >= first_key[:, None]) & (key <= last_key[:, None]), scores, float("-inf"))
        weights = tl.exp2(scores * scale - log_sum_rows[:, None])
        pull = rows_dot(grad_tile, v_tile, None, PRECISION)  # [M, N]
        grad_scores = weights * (pull + minus_delta_rows[:, None])
        if soften is not None:
            grad_scores *= slope
        acc = outer(grad_scores, k_tile, acc, PRECISION)
    return acc
