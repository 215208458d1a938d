"""Forward: output and log-sum-exp of one query tile and one head, over key ranges in two buffers.

One program walks the ranges of its tile (outer loop, a handful of entries) and the key blocks of each range (inner
loops, which the compiler pipelines). Blocks that every row of the tile sees run without a mask. Scores are kept times
log2(e), so that softmax is `exp2`.

FUSED: rows still arrive while this runs. Before a range that another rank sends, the program waits until that rank has
raised its flag: between ranges only, never in the loops over key blocks, which stay pipelined. Ranges of local rows
come first in a tile, and tiles that read nothing else come first in the order, so that they fill the time.

Who waits must not keep out who is waited for. Rows that copy engines or another device bring need no SM of this one:
nothing to do. Where kernels of this device send rows (`put_rows_kernel`), programs that wait can hold every SM while
those kernels stand in line. A put that was started first has its place: enqueue it on a stream of higher priority,
before this kernel, with a grid that fits beside it. Where that cannot be had, `Arrivals.programs` caps how many waiting
programs there are at a time, and the rest of the device stays free. Were all this broken, the waits would still end.

Shapes: M query rows (BLOCK_M), N key rows (BLOCK_N), D head_dim widened to a power of two (BLOCK_D).
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashcp.kernels.blocks import LN2, LOG2E, OWN, RECEIVED, load_rows, load_tile, place, store_rows
from flashcp.kernels.one_sided import wait_until

__all__ = ["forward_kernel"]

LOWEST = tl.constexpr(-3.0e38)  # a maximum before the first score: finite, so that differences are never NaN


@triton.jit(do_not_specialize=["epoch", "spins"])
def forward_kernel(
    q, k, v, k_received, v_received, out, lse, table, ranges, reach, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, kr_row, kr_head, vr_row, vr_head, out_row, out_head, lse_row,
    flags, epoch, stuck, spins,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MERGE: tl.constexpr, PRECISION: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Program (tile, query head). MERGE: go on from the fp32 `out` and `lse` of earlier ranges, not from nothing.

    FUSED: wait until flags[source] >= epoch before a range that names its source; spins, stuck: see `wait_until`.
    """
    head = tl.program_id(1)
    _, row, stop, range_first, range_stop = load_tile(table, tl.program_id(0))
    rows = row + tl.arange(0, BLOCK_M)
    lowest_key = tl.load(reach + rows, mask=rows < stop, other=0)  # [M]
    q_tile = load_rows(place(q, row, q_row, head, q_head), q_row, stop - row, BLOCK_M, HEAD_DIM, BLOCK_D, True)

    out_at = place(out, row, out_row, head, out_head)
    lse_at = lse + rows.to(tl.int64) * lse_row + head
    if MERGE:
        acc = load_rows(out_at, out_row, stop - row, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        before = tl.load(lse_at, mask=rows < stop, other=float("-inf"))
        total = tl.full([BLOCK_M], 1.0, tl.float32)  # where nothing came before, it fades at the first score
        maximum = tl.maximum(before * LOG2E, LOWEST)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        maximum = tl.full([BLOCK_M], LOWEST, tl.float32)

    for i in range(range_first, range_stop):
        if FUSED:
            source = tl.load(ranges + 4 * i + 3)
            if source >= 0:
                wait_until(flags + source, epoch, spins, stuck, source)
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
        acc, total, maximum = _attend(
            acc, total, maximum, q_tile, k_at, v_at, row_k, row_v, start, full, end, first_key, last_key, scale,
            HEAD_DIM, BLOCK_D, BLOCK_N, False, PRECISION,
        )  # fmt: skip
        acc, total, maximum = _attend(
            acc, total, maximum, q_tile, k_at, v_at, row_k, row_v, full, end, end, first_key, last_key, scale,
            HEAD_DIM, BLOCK_D, BLOCK_N, True, PRECISION,
        )  # fmt: skip

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    log_sum = tl.where(empty, float("-inf"), (maximum + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    store_rows(out_at, out_row, stop - row, acc, HEAD_DIM)
    tl.store(lse_at, log_sum, mask=rows < stop)


@triton.jit
def _attend(
    acc, total, maximum, q_tile, k_at, v_at, row_k, row_v, start, stop, end, first_key, last_key, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Blocks of keys from `start` below `stop`; MASKED: only first_key <= key <= last_key count, rows end at `end`."""
    for n in range(start, stop, BLOCK_N):
        k_tile = load_rows(place(k_at, n, row_k, 0, 0), row_k, end - n, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)  # [M, N]
        if MASKED:
            key = (n + tl.arange(0, BLOCK_N))[None, :]
            scores = tl.where((key >= first_key[:, None]) & (key <= last_key[:, None]), scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_maximum[:, None])
        fade = tl.exp2(maximum - new_maximum)
        total = total * fade + tl.sum(weights, 1)
        maximum = new_maximum
        v_tile = load_rows(place(v_at, n, row_v, 0, 0), row_v, end - n, BLOCK_N, HEAD_DIM, BLOCK_D, MASKED)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * fade[:, None], input_precision=PRECISION)
    return acc, total, maximum
