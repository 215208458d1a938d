"""The backward pass on Hopper in one kernel, warp-specialised in Gluon: dK and dV of a key tile, and its share of dQ.

`kernels/backward_kv.py` and `kernels/backward_q.py` compute seven products a block of pairs, five of them useful. A
program here has the gradients of the scores at hand for all it computes and adds what they give to dQ, in fp32, to
memory: five products. Programs come in any order, so two runs differ in dQ's last bits.

A program has three warpgroups. Two compute dK and dV of 64 key rows each, with scores transposed, [keys, queries]: so
weights and their gradients are operands in registers. They leave the gradients of the scores in shared memory. The
third serves them: it copies blocks of Q and dO into rings (TMA), one block ahead, and multiplies what they left with K.
The additions to dQ are slow, and only this warpgroup waits for them. A slot is *full* or *written* when its reader may
have it, *empty* or *used* when its writer may.

Rows of a block beyond its range, and K and V rows beyond the tile, are zeroed before they count as there, for a weight
of zero does not undo a NaN.

Shapes: M = BLOCK_M query rows of a block, N = 64 key rows of a half, D head_dim.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashcp.kernels.hopper import (
    HALF,
    LOG2E,
    OWN,
    RANGE_COLUMNS,
    TILE_COLUMNS,
    block_layout,
    copy_rows,
    is_aligned,
    zero_from,
)
from flashcp.kernels.interface import KV

BLOCK_M, BLOCK_N, STAGES = 64, 128, 2
OPTIONS = {"num_warps": 4, "maxnreg": 168}

PULLS = gl.constexpr(2)  # buffers for the gradients of the scores
PARTS = gl.constexpr(4)  # of dQ's columns, one after the other, for the registers of who serves
REGISTERS = gl.constexpr([224, 56])


@gluon.jit
def hopper_backward_kernel(
    q, grad_out, k, v, k_received, v_received, log_sum, minus_delta,
    grad_q, grad_k, grad_v, grad_k_received, grad_v_received, table, ranges, reach, scale,
    head_rows, gq_row, gq_head, gk_row, gk_head, gv_row, gv_head, gkr_row, gkr_head, gvr_row, gvr_head,
    GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Program (tile, KV head). Q, dO, K and V are descriptors of [rows, heads, head_dim]; grad_q is fp32."""
    BLOCK_M: gl.constexpr = q.block_type.shape[0]
    BLOCK_N: gl.constexpr = k.block_type.shape[0]
    HEAD_DIM: gl.constexpr = k.block_type.shape[2]
    head = gl.program_id(1)
    tile = _tile(table, gl.program_id(0))
    blocks = _count(ranges, tile, head, BLOCK_M, GROUP)

    q_ring = gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK_M, 1, HEAD_DIM], q.layout)
    g_ring = gl.allocate_shared_memory(q.dtype, [STAGES, BLOCK_M, 1, HEAD_DIM], q.layout)
    k_tile = gl.allocate_shared_memory(q.dtype, [1, BLOCK_N, 1, HEAD_DIM], k.layout)
    v_tile = gl.allocate_shared_memory(q.dtype, [1, BLOCK_N, 1, HEAD_DIM], k.layout)
    pulls: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], q.dtype)
    pull = gl.allocate_shared_memory(q.dtype, [PULLS, BLOCK_N, BLOCK_M], pulls)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    sums = gl.allocate_shared_memory(gl.float32, [2 * STAGES, BLOCK_M], plain)  # log-sum-exps, then -deltas
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())  # of Q's slots, then of dO's
    empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    written = gl.allocate_shared_memory(gl.int64, [PULLS, 1], mbarrier.MBarrierLayout())
    used = gl.allocate_shared_memory(gl.int64, [PULLS, 1], mbarrier.MBarrierLayout())
    there = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())  # K and V
    landed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(landed, count=1)
    mbarrier.init(there, count=1)
    for slot in gl.static_range(PULLS):
        mbarrier.init(written.index(slot), count=2)
        mbarrier.init(used.index(slot), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=2)  # the copy, and the numbers of its rows
        mbarrier.init(full.index(STAGES + slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
        mbarrier.init(empty.index(STAGES + slot), count=2)

    rings = (q_ring, g_ring, sums, full, empty)
    held = (k_tile, v_tile, there)
    between = (pull, written, used)
    outputs = (grad_k, grad_v, grad_k_received, grad_v_received)
    strides = (gk_row, gk_head, gv_row, gv_head, gkr_row, gkr_head, gvr_row, gvr_head)
    gl.warp_specialize([
        (_differentiate, (rings, held, between, outputs, strides, ranges, reach, tile, 0, head, blocks, scale, GROUP)),
        (_differentiate, (rings, held, between, outputs, strides, ranges, reach, tile, 1, head, blocks, scale, GROUP)),
        (_serve, (rings, held, between, landed, (q, grad_out, k, v, k_received, v_received), (log_sum, minus_delta),
                  grad_q, (gq_row, gq_head), ranges, tile, head, blocks, head_rows, GROUP)),
    ], [4, 4], REGISTERS)  # fmt: skip


@gluon.jit
def _tile(table, index):
    """A row of `table`: (received, first row, stop, first range, the range behind its last)."""
    entry = table + TILE_COLUMNS * index
    return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), gl.load(entry + 3), gl.load(entry + 4)


@gluon.jit
def _readers(ranges, j, tile, kv_head, GROUP: gl.constexpr):
    """The j-th head's share of a range: (whether the queries are the tile's own run, first row, end, query head)."""
    entry = ranges + RANGE_COLUMNS * (tile[3] + j // GROUP)
    own = gl.load(entry) == OWN
    return own, gl.where(own, tile[1], gl.load(entry + 1)), gl.load(entry + 2), kv_head * GROUP + j % GROUP


@gluon.jit
def _count(ranges, tile, kv_head, BLOCK_M: gl.constexpr, GROUP: gl.constexpr):
    """Blocks of queries that read a tile, of all heads of the group."""
    blocks = 0
    for i in range(tile[4] - tile[3]):
        readers = _readers(ranges, i * GROUP, tile, kv_head, GROUP)
        blocks += GROUP * ((readers[2] - readers[1] + BLOCK_M - 1) // BLOCK_M)
    return blocks


@gluon.jit
def _serve(
    rings, held, between, landed, tensors, numbers, grad_q, strides, ranges, tile, kv_head, blocks, head_rows,
    GROUP: gl.constexpr,
):  # fmt: skip
    """The warpgroup that copies K and V once, then a block of Q and dO ahead of the block whose share of dQ it adds."""
    k_tile, v_tile, there = held
    pull, written, used = between
    q, grad_out, k, v, k_received, v_received = tensors
    BLOCK_M: gl.constexpr = q.block_type.shape[0]
    BLOCK_N: gl.constexpr = k_tile.shape[1]
    HEAD_DIM: gl.constexpr = k_tile.shape[3]
    COLUMNS: gl.constexpr = HEAD_DIM // PARTS
    OUT_Q: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])

    row, stop = tile[1], tile[2]
    mbarrier.expect(landed, 2 * k.block_type.nbytes)
    copy_rows(k, [row, kv_head, 0], landed, k_tile.index(0), pred=tile[0] == 0)
    copy_rows(k_received, [row, kv_head, 0], landed, k_tile.index(0), pred=tile[0] != 0)
    copy_rows(v, [row, kv_head, 0], landed, v_tile.index(0), pred=tile[0] == 0)
    copy_rows(v_received, [row, kv_head, 0], landed, v_tile.index(0), pred=tile[0] != 0)
    mbarrier.wait(landed, 0)
    if stop - row < BLOCK_N:
        zero_from(k_tile.index(0), stop - row)
        zero_from(v_tile.index(0), stop - row)
    mbarrier.arrive(there, count=1)

    waits = 1
    j = 0
    _own, m, end, head = _readers(ranges, 0, tile, kv_head, GROUP)
    waits = _fetch(rings, landed, q, grad_out, numbers, m, end, head, head_rows, 0, waits)
    no_rows = gl.zeros([BLOCK_M, COLUMNS], gl.float32, OUT_Q)
    for block in range(blocks):
        m_now, end_now, head_now = m, end, head
        if block + 1 < blocks:
            m += BLOCK_M
            if m >= end:
                j += 1
                _own, m, end, head = _readers(ranges, j, tile, kv_head, GROUP)
            waits = _fetch(rings, landed, q, grad_out, numbers, m, end, head, head_rows, block + 1, waits)
        turn = block % PULLS
        k_rows = k_tile.index(block >> 30).reshape([BLOCK_N, HEAD_DIM])
        grad_scores = pull.index(turn).permute((1, 0))
        mbarrier.wait(written.index(turn), block // PULLS & 1)
        for part in gl.static_range(PARTS):
            dq = warpgroup_mma(
                grad_scores, k_rows.slice(COLUMNS * part, COLUMNS, dim=1), no_rows, use_acc=False, is_async=True
            )
            dq = warpgroup_mma_wait(0, deps=(dq,))
            if part == PARTS - 1:
                mbarrier.arrive(used.index(turn), count=1)
            _add(grad_q, dq, m_now, end_now, head_now, strides, COLUMNS * part)


@gluon.jit
def _fetch(rings, landed, q, grad_out, numbers, m, end, head, head_rows, block, waits):
    """Start the copies of a block of Q and dO and of the numbers of its rows. Returns how often `landed` was waited
    for, in all."""
    q_ring, g_ring, sums, full, empty = rings
    log_sum, minus_delta = numbers
    STAGES: gl.constexpr = q_ring.shape[0]
    BLOCK_M: gl.constexpr = q_ring.shape[1]
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slot = block % STAGES
    before = (block // STAGES & 1) ^ 1  # a new barrier counts as having completed a phase of parity 1
    of_head = gl.to_tensor(head).to(gl.int64) * head_rows
    rows = m + gl.arange(0, BLOCK_M, layout=LINE)
    log_sum_rows = gl.load(log_sum + of_head + rows, mask=rows < end, other=float("inf"))
    minus_delta_rows = gl.load(minus_delta + of_head + rows, mask=rows < end, other=0.0)
    mbarrier.wait(empty.index(slot), before)
    sums.index(slot).store(log_sum_rows)
    sums.index(STAGES + slot).store(minus_delta_rows)
    if m + BLOCK_M <= end:
        mbarrier.expect(full.index(slot), q.block_type.nbytes)
        copy_rows(q, [m, head, 0], full.index(slot), q_ring.index(slot))
        mbarrier.arrive(full.index(slot), count=1)
        mbarrier.wait(empty.index(STAGES + slot), before)
        mbarrier.expect(full.index(STAGES + slot), q.block_type.nbytes)
        copy_rows(grad_out, [m, head, 0], full.index(STAGES + slot), g_ring.index(slot))
    else:
        mbarrier.wait(empty.index(STAGES + slot), before)
        mbarrier.expect(landed, 2 * q.block_type.nbytes)
        copy_rows(q, [m, head, 0], landed, q_ring.index(slot))
        copy_rows(grad_out, [m, head, 0], landed, g_ring.index(slot))
        mbarrier.wait(landed, waits & 1)
        zero_from(q_ring.index(slot), end - m)
        zero_from(g_ring.index(slot), end - m)
        mbarrier.arrive(full.index(slot), count=2)
        mbarrier.arrive(full.index(STAGES + slot), count=1)
        waits += 1
    return waits


@gluon.jit
def _differentiate(
    rings, held, between, outputs, strides, ranges, reach, tile, HALF_INDEX: gl.constexpr, kv_head, blocks, scale,
    GROUP: gl.constexpr,
):  # fmt: skip
    """A warpgroup that computes dK and dV of the first or second 64 key rows of the tile."""
    q_ring, g_ring, sums, full, empty = rings
    k_tile, v_tile, there = held
    pull, written, used = between
    grad_k, grad_v, grad_k_received, grad_v_received = outputs
    gk_row, gk_head, gv_row, gv_head, gkr_row, gkr_head, gvr_row, gvr_head = strides
    STAGES: gl.constexpr = q_ring.shape[0]
    BLOCK_M: gl.constexpr = q_ring.shape[1]
    BLOCK_N: gl.constexpr = k_tile.shape[1]
    HEAD_DIM: gl.constexpr = q_ring.shape[3]
    ELEMENT: gl.constexpr = q_ring.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)

    received, row, stop = tile[0] != 0, tile[1], tile[2]
    first_key = row + HALF * HALF_INDEX
    keys = first_key + gl.arange(0, HALF, layout=gl.SliceLayout(1, SCORES))  # [N]
    past = gl.load(reach + keys, mask=(keys < stop) & (tile[0] == 0), other=0)
    cut = stop - row < BLOCK_N

    zeros = gl.zeros([HALF, BLOCK_M], gl.float32, SCORES)
    dk = gl.zeros([HALF, HEAD_DIM], gl.float32, OUT)
    dv = gl.zeros([HALF, HEAD_DIM], gl.float32, OUT)
    j = 0
    own, m, end, _head = _readers(ranges, 0, tile, kv_head, GROUP)
    m -= BLOCK_M
    mbarrier.wait(there, 0)
    for block in range(blocks):
        m += BLOCK_M
        if m >= end:
            j += 1
            own, m, end, _head = _readers(ranges, j, tile, kv_head, GROUP)
        slot = block % STAGES
        phase = block // STAGES & 1
        # 0, which the compiler does not know: it would compute where K and V lie beforehand and spill it all.
        nowhere = block >> 30
        k_half = k_tile.index(nowhere).reshape([BLOCK_N, HEAD_DIM]).slice(HALF * HALF_INDEX, HALF)
        v_half = v_tile.index(nowhere).reshape([BLOCK_N, HEAD_DIM]).slice(HALF * HALF_INDEX, HALF)
        q_tile = q_ring.index(slot).reshape([BLOCK_M, HEAD_DIM])
        g_tile = g_ring.index(slot).reshape([BLOCK_M, HEAD_DIM])
        mbarrier.wait(full.index(slot), phase)
        scores = warpgroup_mma(k_half, q_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
        log_sum_rows = sums.index(slot).load(gl.SliceLayout(0, SCORES))
        scores = warpgroup_mma_wait(0, deps=(scores,))
        if cut | (own & (m < stop)) | (m + BLOCK_M > end):
            scores = _mask(scores, own, m, end, stop, keys, past)
            weights = gl.exp2(scores * scale - log_sum_rows[None, :])
        else:
            weights = gl.exp2(scores * scale - log_sum_rows[None, :])
        mbarrier.wait(full.index(STAGES + slot), phase)
        grad_weights = warpgroup_mma(v_half, g_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
        p = gl.convert_layout(weights.to(ELEMENT), LEFT)
        dv = warpgroup_mma(p, g_tile, dv, is_async=True)
        grad_weights = warpgroup_mma_wait(1, deps=(grad_weights,))
        minus_delta_rows = sums.index(STAGES + slot).load(gl.SliceLayout(0, SCORES))
        grad_scores = (weights * (grad_weights + minus_delta_rows[None, :])).to(ELEMENT)
        turn = block % PULLS
        mbarrier.wait(used.index(turn), (block // PULLS & 1) ^ 1)
        pull.index(turn).slice(HALF * HALF_INDEX, HALF).store(grad_scores)
        fence_async_shared()
        mbarrier.arrive(written.index(turn), count=1)
        ds = gl.convert_layout(grad_scores, LEFT)
        dk = warpgroup_mma(ds, q_tile, dk, is_async=True)
        dv, p = warpgroup_mma_wait(1, deps=(dv, p))
        mbarrier.arrive(empty.index(STAGES + slot), count=1)
        dk, ds = warpgroup_mma_wait(0, deps=(dk, ds))
        mbarrier.arrive(empty.index(slot), count=1)

    if received:
        _store(grad_k_received, dk * (scale / LOG2E), first_key, stop, kv_head, gkr_row, gkr_head)
        _store(grad_v_received, dv, first_key, stop, kv_head, gvr_row, gvr_head)
    else:
        _store(grad_k, dk * (scale / LOG2E), first_key, stop, kv_head, gk_row, gk_head)
        _store(grad_v, dv, first_key, stop, kv_head, gv_row, gv_head)


@gluon.constexpr_function
def _wide(columns):
    """[64, columns] with four columns side by side in a thread, for additions of 16 bytes; lanes hold what they hold
    of a product, but for one column bit that they swap with their registers."""
    registers = [[0, 1], [0, 2], [8, 0], *([0, bit] for bit in (16, 32) if bit < columns)]
    return gl.DistributedLinearLayout(
        registers, [[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, columns]
    )


@gluon.jit
def _add(grad_q, dq, m, end, head, strides, first_column: gl.constexpr):
    """Add to rows [M, columns] of dQ from row `m` on, those below `end`, four columns at a time."""
    LAYOUT: gl.constexpr = _wide(dq.shape[1])
    dq = gl.convert_layout(dq, LAYOUT)
    rows = m + gl.arange(0, dq.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    columns = first_column + gl.arange(0, dq.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    of_head = grad_q + gl.to_tensor(head).to(gl.int64) * strides[1]
    at = of_head + rows.to(gl.int64)[:, None] * strides[0] + columns[None, :]
    if m + dq.shape[0] > end:
        gl.atomic_add(at, dq, mask=(rows < end)[:, None], sem="relaxed")
    else:
        gl.atomic_add(at, dq, sem="relaxed")


@gluon.jit
def _mask(scores, own, m, end, stop, keys, past):
    """Leave the scores [N, M] of the queries that see a key, those of an own run between it and where its run ends."""
    at = m + gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, scores.type.layout))[None, :]
    lowest = gl.where(own, keys, 0)[:, None]
    behind = gl.where(keys < stop, gl.where(own, gl.minimum(past, end), end), 0)[:, None]
    return gl.where((at >= lowest) & (at < behind), scores, float("-inf"))


@gluon.jit
def _store(into, sums, first_row, stop, head, stride_row, stride_head):
    """Rows [N, D] of a head from `first_row` on, those below `stop`."""
    LAYOUT: gl.constexpr = sums.type.layout
    row = first_row + gl.arange(0, sums.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, sums.shape[1], layout=gl.SliceLayout(0, LAYOUT))[None, :]
    wide_head = gl.to_tensor(head).to(gl.int64)
    at = into + row.to(gl.int64)[:, None] * stride_row + wide_head * stride_head + column
    gl.store(at, sums.to(into.dtype.element_ty), mask=(row < stop)[:, None])


def takes(q: Tensor, local: KV, received: KV, grad_out: Tensor) -> bool:
    """Whether TMA can read them: rows and heads begin at multiples of 16 bytes, rows a whole number of heads apart."""
    tensors = (q, grad_out, *local, *(received if len(received.k) else ()))
    return len(local.k) > 0 and all(is_aligned(x) for x in tensors)


def launch_hopper_backward(
    q: Tensor,
    local: KV,
    received: KV,
    grad_out: Tensor,
    row_terms: Tensor,
    sums_q: Tensor,
    outputs: tuple[Tensor, ...],
    tables: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> None:
    """Launch it over key tiles of BLOCK_N rows that no documents share, for tensors that it `takes`.

    row_terms: see `backward_rows_kernel`. sums_q: fp32, what this adds to: dQ less the factor `scale` / log2(e).
    outputs: dK, dV, and those of received rows. scale: of the scores, times log2(e).
    """
    if not len(tables[0]):
        return
    head_dim, keys = q.shape[2], (*local, *(received if len(received.k) else local))  # of nothing is no descriptor
    rows_of = [(BLOCK_M, x) for x in (q, grad_out)] + [(BLOCK_N, x) for x in keys]
    descriptors = (
        TensorDescriptor.from_tensor(x, [rows, 1, head_dim], block_layout(rows, head_dim, q.dtype))
        for rows, x in rows_of
    )
    strides = (stride for x in (sums_q, *outputs) for stride in x.stride()[:2])
    hopper_backward_kernel[len(tables[0]), local.k.shape[1]](
        *descriptors, *row_terms, sums_q, *outputs, *tables, scale, row_terms.stride(1), *strides,
        q.shape[1] // local.k.shape[1], STAGES, **OPTIONS,
    )  # fmt: skip
