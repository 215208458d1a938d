"""Backward: dK and dV of one key tile and one KV head.

A program walks the ranges of query rows that read its tile and, for each, the query heads of its group. Every element
is written by one program, sums run in a fixed order: two runs agree bit for bit.

Shapes: N key rows (BLOCK_N), M query rows (BLOCK_M), W the width of a part of head_dim (`kernels/parts.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashcp.kernels.blocks import (
    OWN,
    REACH_COLUMNS,
    is_mixed,
    load_tile,
    note_mixed,
    own_end,
    place,
    product_scale,
    range_entry,
    squash,
)
from flashcp.kernels.parts import load_rows, outer, rows_dot, store_rows, sum_columns, times, zero_rows

FAR = tl.constexpr(0x7FFFFFFF)


@triton.jit(do_not_specialize=["tiles", "heads"])
def backward_kv_kernel(
    q, k, v, k_received, v_received, grad_out, log_sum, minus_delta, grad_k, grad_v, grad_k_received, grad_v_received,
    table, ranges, reach, mixed, scale, soften,
    q_row, q_head, k_row, k_head, v_row, v_head, kr_row, kr_head, vr_row, vr_head,
    grad_row, grad_head, head_rows, gk_row, gk_head, gv_row, gv_head, gkr_row, gkr_head, gvr_row, gvr_head,
    tiles, heads,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, APART: tl.constexpr, INTERVALS: tl.constexpr,
):  # fmt: skip
    """Program (tile, KV head). APART: the second launch that `kernels/blocks.py` speaks of, by a few programs."""
    if APART:
        for work in range(tl.program_id(0), tiles * heads * tl.load(mixed), tl.num_programs(0)):
            tile, head = work % tiles, work // tiles
            if is_mixed(mixed, tile, head, heads):
                _, row, stop, range_first, range_stop = load_tile(table, tile)
                first = row
                while first < stop:
                    past = own_end(reach, first, INTERVALS)
                    dk, dv = _sums(
                        q, k, v, k_received, v_received, grad_out, log_sum, minus_delta, ranges, reach, scale, soften,
                        q_row, q_head, k_row, k_head, v_row, v_head, kr_row, kr_head, vr_row, vr_head,
                        grad_row, grad_head, head_rows, 0, row, stop, range_first, range_stop, first, past, head,
                        GROUP, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_N, PRECISION, INTERVALS,
                    )  # fmt: skip
                    at_k = place(grad_k, row, gk_row, head, gk_head)
                    at_v = place(grad_v, row, gv_row, head, gv_head)
                    store_rows(at_k, gk_row, past - row, times(dk, product_scale(scale, soften)), HEAD_DIM, first - row)
                    store_rows(at_v, gv_row, past - row, dv, V_DIM, first - row)
                    first = past
    else:
        tile, head = tl.program_id(0), tl.program_id(1)
        received, row, stop, range_first, range_stop = load_tile(table, tile)
        dk, dv = _sums(
            q, k, v, k_received, v_received, grad_out, log_sum, minus_delta, ranges, reach, scale, soften,
            q_row, q_head, k_row, k_head, v_row, v_head, kr_row, kr_head, vr_row, vr_head,
            grad_row, grad_head, head_rows, received, row, stop, range_first, range_stop, None, None, head,
            GROUP, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_N, PRECISION, INTERVALS,
        )  # fmt: skip
        # Read again rather than kept: the loops above need every register there is.
        received, row, stop, _, _ = load_tile(table, tile, True)
        if received != 0:
            dk = times(dk, product_scale(scale, soften))
            store_rows(place(grad_k_received, row, gkr_row, head, gkr_head), gkr_row, stop - row, dk, HEAD_DIM)
            store_rows(place(grad_v_received, row, gvr_row, head, gvr_head), gvr_row, stop - row, dv, V_DIM)
        else:
            past = own_end(reach, row, INTERVALS)
            if (past > row) & (past < stop):  # several documents share the tile
                note_mixed(mixed, tile, head, heads, sum_columns(dk) + sum_columns(dv))
            dk = times(dk, product_scale(scale, soften))
            store_rows(place(grad_k, row, gk_row, head, gk_head), gk_row, stop - row, dk, HEAD_DIM)
            store_rows(place(grad_v, row, gv_row, head, gv_head), gv_row, stop - row, dv, V_DIM)


@triton.jit
def _sums(
    q, k, v, k_received, v_received, grad_out, log_sum, minus_delta, ranges, reach, scale, soften,
    q_row, q_head, k_row, k_head, v_row, v_head, kr_row, kr_head, vr_row, vr_head,
    grad_row, grad_head, head_rows, received, row, stop, range_first, range_stop, first, past, kv_head,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, INTERVALS: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys, less a factor, and of the values, [N, D] each, from the queries from `first` (None: from
    where the ranges begin) below `past`."""
    is_received = received != 0
    row_k = tl.where(is_received, kr_row, k_row)
    row_v = tl.where(is_received, vr_row, v_row)
    k_at = place(tl.where(is_received, k_received, k), row, row_k, kv_head, tl.where(is_received, kr_head, k_head))
    v_at = place(tl.where(is_received, v_received, v), row, row_v, kv_head, tl.where(is_received, vr_head, v_head))
    k_tile = load_rows(k_at, row_k, stop - row, BLOCK_N, HEAD_DIM, True)
    v_tile = load_rows(v_at, row_v, stop - row, BLOCK_N, V_DIM, True)
    dk = zero_rows(BLOCK_N, HEAD_DIM)
    dv = zero_rows(BLOCK_N, V_DIM)

    for j in range(GROUP * (range_stop - range_first)):
        head = kv_head * GROUP + j % GROUP
        entry = range_entry(ranges, range_first + j // GROUP, INTERVALS)
        is_own = tl.load(entry) == OWN
        if INTERVALS:
            shift = tl.load(entry + 4)
            of_first = reach + REACH_COLUMNS * (received + row)
            of_last = reach + REACH_COLUMNS * (received + stop - 1)
            start = tl.maximum(tl.load(entry + 1), tl.load(of_first) - shift)
            end = tl.minimum(tl.load(entry + 2), tl.load(of_last + 1) - shift)
            seen_from, seen_to = tl.load(of_last) - shift, tl.load(of_first + 1) - shift
        else:
            shift = 0
            start = tl.where(is_own, row, tl.load(entry + 1))
            end = tl.load(entry + 2)
        if past is not None:
            end = tl.minimum(end, past)
        if INTERVALS:
            # Query blocks need the mask that begin before all keys are seen, and those where some no more are.
            beside = tl.cdiv(tl.maximum(tl.minimum(seen_from, end) - start, 0), BLOCK_M)
            behind = start + beside * BLOCK_M
            full = behind + tl.maximum(tl.minimum(seen_to, end) - behind, 0) // BLOCK_M * BLOCK_M
        else:
            # Query blocks beside the tile's own rows need the mask, those behind it do not, the last may be cut off.
            beside = tl.where(is_own, tl.cdiv(stop - row, BLOCK_M), 0)
            behind = start + beside * BLOCK_M
            full = behind + tl.maximum(end - behind, 0) // BLOCK_M * BLOCK_M
        q_at = place(q, 0, 0, head, q_head)
        grad_at = place(grad_out, 0, 0, head, grad_head)
        log_sum_at = log_sum + tl.cast(head, tl.int64) * head_rows
        minus_delta_at = minus_delta + tl.cast(head, tl.int64) * head_rows
        dk, dv = _scatter(
            dk, dv, k_tile, v_tile, q_at, grad_at, log_sum_at, minus_delta_at, q_row, grad_row,
            0, (full - behind) // BLOCK_M, behind, behind, first, end, row, stop, received, reach, is_own, shift,
            scale, soften, HEAD_DIM, V_DIM, BLOCK_M, False, PRECISION, INTERVALS,
        )  # fmt: skip
        if INTERVALS:
            blocks = beside + tl.cdiv(tl.maximum(end - full, 0), BLOCK_M)
        else:
            blocks = beside + tl.where(full < end, 1, 0)
        dk, dv = _scatter(
            dk, dv, k_tile, v_tile, q_at, grad_at, log_sum_at, minus_delta_at, q_row, grad_row,
            beside, blocks, start, full, first, end, row, stop, received, reach, is_own, shift,
            scale, soften, HEAD_DIM, V_DIM, BLOCK_M, True, PRECISION, INTERVALS,
        )  # fmt: skip
    return dk, dv


@triton.jit
def _scatter(
    dk, dv, k_tile, v_tile, q_at, grad_at, log_sum_at, minus_delta_at, q_row, grad_row,
    beside, blocks, start, full, first, end, row, stop, received, reach, is_own, shift,
    scale, soften, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, INTERVALS: tl.constexpr,
):  # fmt: skip
    """`beside` blocks of queries from `start` on, the others of `blocks` from `full` on.

    MASKED: rows begin at `first` (None: anywhere) and end at `end`. A query of an own run counts for a
    key if key <= query < where the key's run ends. INTERVALS: for a key whose interval of readers
    holds it; shift: of the range.
    """
    for b in range(blocks):
        m = full + (b - beside) * BLOCK_M
        if MASKED:
            m = tl.where(b < beside, start + b * BLOCK_M, m)
        above = None
        if first is not None:
            above = first - m
        at = m + tl.arange(0, BLOCK_M)  # [M]
        q_tile = load_rows(place(q_at, m, q_row, 0, 0), q_row, end - m, BLOCK_M, HEAD_DIM, MASKED, above)
        grad_rows = place(grad_at, m, grad_row, 0, 0)
        grad_tile = load_rows(grad_rows, grad_row, end - m, BLOCK_M, V_DIM, MASKED, above)
        if MASKED:
            there = at < end
            if first is not None:
                there &= at >= first
            log_sum_rows = tl.load(log_sum_at + at, mask=there, other=float("inf"))
            minus_delta_rows = tl.load(minus_delta_at + at, mask=there, other=0.0)
        else:
            log_sum_rows = tl.load(log_sum_at + at)
            minus_delta_rows = tl.load(minus_delta_at + at)
        # The log-sum-exp is subtracted after the product and loaded a block ahead of it, so that nobody waits for it;
        # -delta is where the other product starts from, which is later and takes fewer registers.
        scores = rows_dot(k_tile, q_tile, None, PRECISION)  # [N, M]
        if soften is not None:
            scores = squash(scores, soften)
            slope = 1.0 - scores * scores
        if MASKED:
            key = row + tl.arange(0, k_tile[0].shape[0])  # [N]
            if INTERVALS:
                of_key = reach + REACH_COLUMNS * (received + key)
                lowest = tl.load(of_key, mask=key < stop, other=0) - shift
                past_last = tl.load(of_key + 1, mask=key < stop, other=0) - shift
            else:
                lowest = tl.where(is_own, key, 0)
                past_last = tl.load(reach + key, mask=is_own & (key < stop), other=FAR)
            seen = (at[None, :] >= lowest[:, None]) & (at[None, :] < past_last[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        weights = tl.exp2(scores * scale - log_sum_rows[None, :])
        dv = outer(weights, grad_tile, dv, PRECISION)
        start_from = tl.broadcast_to(minus_delta_rows[None, :], [k_tile[0].shape[0], BLOCK_M])
        pull = rows_dot(v_tile, grad_tile, start_from, PRECISION)  # [N, M]
        grad_scores = weights * pull
        if soften is not None:
            grad_scores *= slope
        dk = outer(grad_scores, q_tile, dk, PRECISION)
    return dk, dv
