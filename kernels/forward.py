"""Forward: output and log-sum-exp of one query tile and one head, over key ranges in two buffers.

One program walks the ranges of its tile (outer loop, a handful of entries) and the key blocks of each range (inner
loops, which the compiler pipelines). Blocks that every row of the tile sees run without a mask. Scores are kept times
log2(e), so that softmax is `exp2`.

FUSED: rows still arrive while this runs. Before a range that another rank sends, the program waits until that rank has
raised its flag: between ranges only, never in the loops over key blocks, which stay pipelined. Ranges of local rows
come first in a tile, and tiles that read nothing else come first in the order, so that they fill the time.

Who waits must not keep out who is waited for. Copy engines bring rows and stream memory operations raise the flags:
neither needs a multiprocessor. But copies within one device may be kernels, and so is what other streams run, and
programs that wait can hold every multiprocessor. So as many programs as fit beside each other, a few multiprocessors
left free (`MARGIN` in `kernels/launch.py`), share all tiles in the tables' order. Were all this broken, the waits would
still end.

Shapes: M query rows (BLOCK_M), N key rows (BLOCK_N), W the width of a part of head_dim (`kernels/parts.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashcp.kernels.blocks import (
    LN2,
    LOG2E,
    is_mixed,
    key_range,
    load_tile,
    note_mixed,
    own_end,
    place,
    range_entry,
    row_bounds,
    skip_full,
    squash,
)
from flashcp.kernels.one_sided import wait_until
from flashcp.kernels.parts import load_rows, outer, rows_dot, store_rows, sum_columns, times, zero_rows

LOWEST = tl.constexpr(-3.0e38)  # a maximum before the first score: finite, so that differences are never NaN


@triton.jit(do_not_specialize=["tiles", "ready_tiles", "heads", "epoch", "spins"])
def forward_kernel(
    q, k, v, k_received, v_received, out, lse, table, ranges, reach, mixed, scale, soften,
    q_row, q_head, k_row, k_head, v_row, v_head, kr_row, kr_head, vr_row, vr_head, out_row, out_head, lse_row,
    tiles, ready_tiles, heads, flags, epoch, stuck, spins,
    GROUP: tl.constexpr, TILE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MERGE: tl.constexpr, PRECISION: tl.constexpr, FUSED: tl.constexpr, APART: tl.constexpr,
    INTERVALS: tl.constexpr,
):  # fmt: skip
    """Program (tile, TILE_HEADS query heads of one KV head).

    soften: of a softcap, see `squash`; None without; scale is then the cap times log2(e). INTERVALS: of a schedule with
    masks, whose tables are those of `kernels/intervals.py`.
    MERGE: go on from the fp32 `out` and `lse` of earlier ranges, not from nothing.
    FUSED: a few programs share the tiles and heads, and wait until flags[source] >= epoch before a range that names its
    source; the first `ready_tiles` of the `tiles` name none; spins, stuck: see `wait_until`.
    APART: the second launch that `kernels/blocks.py` speaks of, by a few programs too. It waits for nobody any more.
    """
    if FUSED or APART:
        groups = heads // TILE_HEADS
        count = tiles * groups
        if APART:
            count *= tl.load(mixed)
        for work in tl.range(tl.program_id(0), count, tl.num_programs(0), disable_licm=True):
            # Ready tiles go head by head, for tiles side by side find one head's KV in the cache; the others tile by
            # tile, for no head shall wait for late rows before all heads have read the early ones.
            behind = work >= ready_tiles * groups
            tile = tl.where(behind, work // groups, work % tl.maximum(ready_tiles, 1))
            head = tl.where(behind, work % groups, work // tl.maximum(ready_tiles, 1)) * TILE_HEADS
            chosen = True
            if APART:
                chosen = is_mixed(mixed, tile, head, heads)
            if chosen:
                _tile(
                    q, k, v, k_received, v_received, out, lse, table, ranges, reach, mixed, scale, soften,
                    q_row, q_head, k_row, k_head, v_row, v_head, kr_row, kr_head, vr_row, vr_head,
                    out_row, out_head, lse_row, tile, head, heads, flags, epoch, stuck, spins,
                    GROUP, TILE_HEADS, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_N, MERGE, PRECISION, FUSED, APART, INTERVALS,
                )  # fmt: skip
    else:
        _tile(
            q, k, v, k_received, v_received, out, lse, table, ranges, reach, mixed, scale, soften,
            q_row, q_head, k_row, k_head, v_row, v_head, kr_row, kr_head, vr_row, vr_head,
            out_row, out_head, lse_row, tl.program_id(0), tl.program_id(1) * TILE_HEADS, heads,
            flags, epoch, stuck, spins,
            GROUP, TILE_HEADS, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_N, MERGE, PRECISION, False, False, INTERVALS,
        )  # fmt: skip


@triton.jit
def _tile(
    q, k, v, k_received, v_received, out, lse, table, ranges, reach, mixed, scale, soften,
    q_row, q_head, k_row, k_head, v_row, v_head, kr_row, kr_head, vr_row, vr_head, out_row, out_head, lse_row,
    tile, head, heads, flags, epoch, stuck, spins,
    GROUP: tl.constexpr, TILE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MERGE: tl.constexpr, PRECISION: tl.constexpr, FUSED: tl.constexpr, APART: tl.constexpr,
    INTERVALS: tl.constexpr,
):  # fmt: skip
    """One tile and TILE_HEADS query heads from `head` on."""
    _, row, stop, range_first, range_stop = load_tile(table, tile)
    out_at = place(out, row, out_row, head, out_head)
    i = tl.arange(0, BLOCK_M)
    lse_at = lse + (row + i // TILE_HEADS).to(tl.int64) * lse_row + (head + i % TILE_HEADS)
    if APART:
        noted = tl.load(mixed + 1 + tile * heads + head)  # 1: all of the tile; of the forward on Hopper a half, or both
        past = stop
        while past > row:
            first = own_end(reach, past, INTERVALS, True)
            acc, total, maximum = _sums(
                q, k, v, k_received, v_received, out_at, lse_at, ranges, reach, scale, soften,
                q_row, q_head, k_row, k_head, v_row, v_head, kr_row, kr_head, vr_row, vr_head, out_row, out_head,
                row, stop, range_first, range_stop, first, past, head, flags, epoch, stuck, spins,
                GROUP, TILE_HEADS, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_N, MERGE, PRECISION, FUSED, INTERVALS,
            )  # fmt: skip
            # The other half, if it is well, was stored, and must not be merged twice.
            begin = tl.maximum(first - row, tl.where((noted & 3) != 0, 0, BLOCK_M // 2 // TILE_HEADS))
            end = tl.minimum(past - row, tl.where((noted & 5) != 0, BLOCK_M, BLOCK_M // 2) // TILE_HEADS)
            _finish(out_at, lse_at, acc, total, maximum, out_row, out_head, begin, end, TILE_HEADS, V_DIM, INTERVALS)
            past = first
    else:
        acc, total, maximum = _sums(
            q, k, v, k_received, v_received, out_at, lse_at, ranges, reach, scale, soften,
            q_row, q_head, k_row, k_head, v_row, v_head, kr_row, kr_head, vr_row, vr_head, out_row, out_head,
            row, stop, range_first, range_stop, None, stop, head, flags, epoch, stuck, spins,
            GROUP, TILE_HEADS, HEAD_DIM, V_DIM, BLOCK_M, BLOCK_N, MERGE, PRECISION, FUSED, INTERVALS,
        )  # fmt: skip
        spoilt = False
        if own_end(reach, stop, INTERVALS, True) > row:  # several documents share the tile
            sums = sum_columns(acc)
            note_mixed(mixed, tile, head, heads, sums)
            if MERGE:  # what is to be merged again has to stay
                spoilt = tl.sum((sums != sums).to(tl.int32), 0) > 0
        if not spoilt:
            _finish(
                out_at, lse_at, acc, total, maximum, out_row, out_head, None, stop - row,
                TILE_HEADS, V_DIM, INTERVALS,
            )  # fmt: skip


@triton.jit
def _sums(
    q, k, v, k_received, v_received, out_at, lse_at, ranges, reach, scale, soften,
    q_row, q_head, k_row, k_head, v_row, v_head, kr_row, kr_head, vr_row, vr_head, out_row, out_head,
    row, stop, range_first, range_stop, first, past, head, flags, epoch, stuck, spins,
    GROUP: tl.constexpr, TILE_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MERGE: tl.constexpr, PRECISION: tl.constexpr, FUSED: tl.constexpr, INTERVALS: tl.constexpr,
):  # fmt: skip
    """Weighted values [M, D], sums of weights and largest scores [M]; of its own rows the tile reads those from `first`
    (None: from where its ranges begin) below `past`."""
    rows = row + tl.arange(0, BLOCK_M) // TILE_HEADS
    bounds = row_bounds(reach, row, stop, rows, INTERVALS)
    q_tile = load_rows(
        place(q, row, q_row, head, q_head), q_row, stop - row, BLOCK_M, HEAD_DIM, True, None, q_head, TILE_HEADS
    )
    if MERGE:
        acc = load_rows(out_at, out_row, stop - row, BLOCK_M, V_DIM, True, None, out_head, TILE_HEADS)
        before = tl.load(lse_at, mask=rows < stop, other=float("-inf"))
        total = tl.where(before == float("-inf"), 0.0, 1.0)
        maximum = tl.maximum(before * LOG2E, LOWEST)
    else:
        acc = zero_rows(BLOCK_M, V_DIM)
        total = tl.zeros([BLOCK_M], tl.float32)
        maximum = tl.full([BLOCK_M], LOWEST, tl.float32)

    for i in range(range_first, range_stop):
        entry = range_entry(ranges, i, INTERVALS)
        if FUSED:
            source = tl.load(entry + 3)
            if source >= 0:
                wait_until(flags + source, epoch, spins, stuck, source)
        k_at, v_at, row_k, row_v, start, full, edge, gap, end, first_key, last_key = key_range(
            entry, k, v, k_received, v_received, k_row, k_head, v_row, v_head, kr_row, kr_head, vr_row, vr_head,
            head // GROUP, row, first, past, rows, bounds, BLOCK_N, INTERVALS,
        )  # fmt: skip
        acc, total, maximum = _attend(
            acc, total, maximum, q_tile, k_at, v_at, row_k, row_v, start, full, full, gap, first, end,
            first_key, last_key, scale, soften, HEAD_DIM, V_DIM, BLOCK_N, False, PRECISION, INTERVALS,
        )  # fmt: skip
        acc, total, maximum = _attend(
            acc, total, maximum, q_tile, k_at, v_at, row_k, row_v, edge, end, full, gap, first, end,
            first_key, last_key, scale, soften, HEAD_DIM, V_DIM, BLOCK_N, True, PRECISION, INTERVALS,
        )  # fmt: skip
    return acc, total, maximum


@triton.jit
def _finish(out_at, lse_at, acc, total, maximum, out_row, out_head, first, past, TILE_HEADS: tl.constexpr,
            V_DIM: tl.constexpr, INTERVALS: tl.constexpr):  # fmt: skip
    """Store output and log-sum-exp of rows `first` (None: 0) to `past` of the tile."""
    row = tl.arange(0, acc[0].shape[0]) // TILE_HEADS
    there = row < past
    if first is not None:
        there &= row >= first
    share = 1.0 / total
    if INTERVALS:  # a row may see nothing of what its tile reads: it keeps what it has
        share = tl.where(total == 0.0, 0.0, share)
    store_rows(out_at, out_row, past, times(acc, share[:, None]), V_DIM, first, out_head, TILE_HEADS)
    tl.store(lse_at, (maximum + tl.log2(total)) * LN2, mask=there)


@triton.jit
def _attend(
    acc, total, maximum, q_tile, k_at, v_at, row_k, row_v, start, stop, full, gap, first, end,
    first_key, last_key, scale, soften,
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
        scores = rows_dot(q_tile, k_tile, None, PRECISION)  # [M, N]
        if soften is not None:
            scores = squash(scores, soften)
        if MASKED:
            key = (n + tl.arange(0, BLOCK_N))[None, :]
            scores = tl.where((key >= first_key[:, None]) & (key <= last_key[:, None]), scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_maximum[:, None])
        fade = tl.exp2(maximum - new_maximum)
        total = total * fade + tl.sum(weights, 1)
        maximum = new_maximum
        v_tile = load_rows(place(v_at, n, row_v, 0, 0), row_v, end - n, BLOCK_N, V_DIM, MASKED, above)
        acc = outer(weights, v_tile, times(acc, fade[:, None]), PRECISION)
    return acc, total, maximum
