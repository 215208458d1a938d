"""The forward pass on Hopper, warp-specialised in Gluon: what `kernels/forward.py` computes, by TMA and wgmma.

A program has three warpgroups. One copies K and V blocks into rings of shared memory (TMA), two attend, 64 query rows
each, in FlashAttention-3's order: the scores of a block and the product of the block before it are computed while the
weights of neither are needed. A slot of a ring is *full* when its copy has landed and *empty* when both halves of the
tile have read it. Both sides walk the same blocks in the same order, so the n-th wait for a slot is for its n-th use.

Which rows are read is said by the tables of `kernels/tiles.py`. Rows of a block beyond its range may hold anything,
NaN too: their scores are masked, and their V rows zeroed, since a weight of zero does not undo a NaN. A half of a tile
of several documents that meets a NaN all the same is not stored but noted, and done again by the second launch that
`kernels/blocks.py` speaks of: the portable kernel's, so that the documents beside the NaN are right, but not to the bit
what they are without it.

It waits for no flags: a flag does not order what TMA reads. `fused` takes the portable kernel.

Shapes: M = 64 query rows of a half, N key rows of a block (BLOCK_N), D head_dim.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashcp.kernels import tiles
from flashcp.kernels.interface import KV

BLOCK_N, STAGES = 128, 2
OPTIONS = {"num_warps": 4, "maxnreg": 168}  # warps of one half; 168 registers x 3 warpgroups are all there are
_ALIGNED = 16  # bytes: what TMA asks of addresses and strides
copy_rows = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # the name from triton 3.9 on

HALF = gl.constexpr(64)
LN2 = gl.constexpr(0.6931471805599453)
LOG2E = gl.constexpr(1.4426950408889634)
NO_KEY = gl.constexpr(2147483647)
LOWEST = gl.constexpr(-3.0e38)  # a maximum before the first score: finite, so that differences are never NaN
RECEIVED = gl.constexpr(tiles.RECEIVED)
OWN = gl.constexpr(tiles.OWN)
TILE_COLUMNS = gl.constexpr(tiles.TILE_COLUMNS)
RANGE_COLUMNS = gl.constexpr(tiles.RANGE_COLUMNS)


@gluon.jit
def hopper_forward_kernel(
    q, k, v, k_received, v_received, out, lse, table, ranges, reach, mixed, scale,
    q_row, q_head, out_row, out_head, lse_row, GROUP: gl.constexpr, STAGES: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """Program (tile, query head). As `forward_kernel`, with K and V as descriptors of [rows, heads, head_dim]."""
    BLOCK_N: gl.constexpr = k.block_type.shape[0]
    HEAD_DIM: gl.constexpr = k.block_type.shape[2]
    head = gl.program_id(1)
    tile = _tile(table, gl.program_id(0))
    blocks = _count(ranges, tile, BLOCK_N)

    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, HEAD_DIM], k.dtype)
    q_tiles = gl.allocate_shared_memory(k.dtype, [2, HALF, HEAD_DIM], rows_layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [STAGES, BLOCK_N, 1, HEAD_DIM], k.layout)
    v_ring = gl.allocate_shared_memory(k.dtype, [STAGES, BLOCK_N, 1, HEAD_DIM], k.layout)
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())  # of K's slots, then of V's
    empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    landed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(landed, count=1)
    for slot in gl.static_range(2 * STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)

    rings = (k_ring, v_ring, full, empty)
    tensors = (q, out, lse, ranges, reach, mixed)
    strides = (q_row, q_head, out_row, out_head, lse_row)
    gl.warp_specialize([
        (_attend, (rings, q_tiles.index(0), tensors, strides, tile, 0, head, blocks, scale, MERGE)),
        (_attend, (rings, q_tiles.index(1), tensors, strides, tile, 1, head, blocks, scale, MERGE)),
        (_fetch, (rings, landed, (k, v, k_received, v_received), ranges, tile, head // GROUP)),
    ], [4, 4], [232, 40])  # fmt: skip


@gluon.jit
def _tile(table, index):
    """A row of `table`: (first row, stop, first range, the range behind its last)."""
    entry = table + TILE_COLUMNS * index
    return gl.load(entry + 1), gl.load(entry + 2), gl.load(entry + 3), gl.load(entry + 4)


@gluon.jit
def _range(ranges, i, tile):
    """An entry of `ranges`: (place, first key, end, the key from which on some row of the tile does not see it)."""
    row, stop, _, _ = tile
    entry = ranges + RANGE_COLUMNS * i
    place = gl.load(entry)
    end = gl.load(entry + 2)
    return place, gl.load(entry + 1), gl.where(place == OWN, stop, end), gl.where(place == OWN, row, end)


@gluon.jit
def _count(ranges, tile, BLOCK_N: gl.constexpr):
    """Blocks of keys that a tile reads."""
    blocks = 0
    for i in range(tile[2], tile[3]):
        _, start, end, _ = _range(ranges, i, tile)
        blocks += (end - start + BLOCK_N - 1) // BLOCK_N
    return blocks


@gluon.jit
def _fetch(rings, landed, tensors, ranges, tile, head):
    """The warpgroup that copies. V rows beyond a range are zeroed here, before the slot counts as full."""
    k_ring, v_ring, full, empty = rings
    k, v, k_received, v_received = tensors
    STAGES: gl.constexpr = k_ring.shape[0]
    BLOCK_N: gl.constexpr = k_ring.shape[1]
    block = 0
    cut = 0
    for i in range(tile[2], tile[3]):
        place, start, end, _ = _range(ranges, i, tile)
        received = place == RECEIVED
        for n in range(start, end, BLOCK_N):
            slot = block % STAGES
            before = (block // STAGES & 1) ^ 1  # a new barrier counts as having completed a phase of parity 1
            mbarrier.wait(empty.index(slot), before)
            _copy(k, k_received, received, n, head, full.index(slot), k_ring.index(slot))
            mbarrier.wait(empty.index(STAGES + slot), before)
            if n + BLOCK_N <= end:
                _copy(v, v_received, received, n, head, full.index(STAGES + slot), v_ring.index(slot))
            else:
                _copy(v, v_received, received, n, head, landed, v_ring.index(slot))
                mbarrier.wait(landed, cut & 1)
                zero_from(v_ring.index(slot), end - n)
                mbarrier.arrive(full.index(STAGES + slot), count=1)
                cut += 1
            block += 1


@gluon.jit
def _copy(local, received, from_received, n, head, arrived, slot):
    """Start the copy of BLOCK_N rows from `n` on; `arrived` completes a phase when they are there."""
    mbarrier.expect(arrived, local.block_type.nbytes)
    copy_rows(local, [n, head, 0], arrived, slot, pred=from_received == 0)
    copy_rows(received, [n, head, 0], arrived, slot, pred=from_received)


@gluon.jit
def zero_from(slot, row):
    """Zero the rows of a slot from `row` on, and let the tensor cores see it."""
    BLOCK_N: gl.constexpr = slot.shape[0]
    HEAD_DIM: gl.constexpr = slot.shape[2]
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    STEP: gl.constexpr = 16
    rows = slot.reshape([BLOCK_N, HEAD_DIM])
    for first in gl.static_range(0, BLOCK_N, STEP):
        if row < first + STEP:
            part = rows.slice(first, STEP)
            keep = first + gl.arange(0, STEP, layout=gl.SliceLayout(1, WIDE)) < row
            part.store(gl.where(keep[:, None], part.load(WIDE), 0.0))
    fence_async_shared()


@gluon.jit
def _attend(rings, q_tile, tensors, strides, tile, half, head, blocks, scale, MERGE: gl.constexpr):
    """A warpgroup that attends: the first or second 64 query rows of the tile, those below the tile's stop."""
    k_ring, v_ring, full, empty = rings
    q, out, lse, ranges, reach, mixed = tensors
    q_row, q_head, out_row, out_head, lse_row = strides
    STAGES: gl.constexpr = k_ring.shape[0]
    BLOCK_N: gl.constexpr = k_ring.shape[1]
    HEAD_DIM: gl.constexpr = k_ring.shape[3]
    ELEMENT: gl.constexpr = q.dtype.element_ty
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])

    first_row = tile[0] + HALF * half
    offsets, there = _offsets(first_row, tile[1], head, q_row, q_head, WIDE, HEAD_DIM)
    q_tile.store(gl.load(q + offsets, mask=there, other=0.0))
    fence_async_shared()
    rows = first_row + gl.arange(0, HALF, layout=gl.SliceLayout(1, SCORES))
    # Rows beyond the tile see no own row: a NaN behind the tile would otherwise count as one of its rows'.
    lowest_key = gl.load(reach + rows, mask=rows < tile[1], other=NO_KEY)  # [M]

    # The first block, with nothing to multiply beside it.
    no_scores = gl.zeros([HALF, BLOCK_N], gl.float32, SCORES)
    if MERGE:
        offsets, there = _offsets(first_row, tile[1], head, out_row, out_head, OUT, HEAD_DIM)
        acc = gl.load(out + offsets, mask=there, other=0.0)
        before = gl.load(lse + rows.to(gl.int64) * lse_row + head, mask=rows < tile[1], other=float("-inf"))
        total = gl.where(before == float("-inf"), 0.0, 1.0)
        maximum = gl.maximum(before * LOG2E, LOWEST)
    else:
        acc = gl.zeros([HALF, HEAD_DIM], gl.float32, OUT)
        total = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, SCORES))
        maximum = gl.full([HALF], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
    i = tile[2]
    place, n, end, seen_by_all = _range(ranges, i, tile)
    mbarrier.wait(full.index(0), 0)
    k_tile = k_ring.index(0).reshape([BLOCK_N, HEAD_DIM]).permute((1, 0))
    scores = warpgroup_mma(q_tile, k_tile, no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(empty.index(0), count=1)
    scores = _mask(scores, place, n, end, rows, lowest_key)
    weights, fade, maximum, total = _softmax(scores, maximum, total, scale)
    if MERGE:
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, OUT))[:, None]
    p = gl.convert_layout(weights.to(ELEMENT), WEIGHTS)

    for block in range(1, blocks):
        slot = block % STAGES
        last = (block - 1) % STAGES
        mbarrier.wait(full.index(STAGES + last), (block - 1) // STAGES & 1)
        mbarrier.wait(full.index(slot), block // STAGES & 1)
        k_tile = k_ring.index(slot).reshape([BLOCK_N, HEAD_DIM]).permute((1, 0))
        scores = warpgroup_mma(q_tile, k_tile, no_scores, use_acc=False, is_async=True)
        acc = warpgroup_mma(p, v_ring.index(last).reshape([BLOCK_N, HEAD_DIM]), acc, is_async=True)
        n += BLOCK_N
        if n >= end:
            i += 1
            place, n, end, seen_by_all = _range(ranges, i, tile)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        mbarrier.arrive(empty.index(slot), count=1)
        # The softmax stands in both branches: in a block of its own the assembler puts it behind the next wait.
        if n + BLOCK_N > seen_by_all:
            scores = _mask(scores, place, n, end, rows, lowest_key)
            weights, fade, maximum, total = _softmax(scores, maximum, total, scale)
        else:
            weights, fade, maximum, total = _softmax(scores, maximum, total, scale)
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        mbarrier.arrive(empty.index(STAGES + last), count=1)
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, OUT))[:, None]
        p = gl.convert_layout(weights.to(ELEMENT), WEIGHTS)

    last = (blocks - 1) % STAGES
    mbarrier.wait(full.index(STAGES + last), (blocks - 1) // STAGES & 1)
    acc = warpgroup_mma(p, v_ring.index(last).reshape([BLOCK_N, HEAD_DIM]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))

    spoilt = False
    if gl.load(reach + tile[1] - 1) > tile[0]:  # several documents share the tile
        sums = gl.sum(acc, 1)
        spoilt = gl.sum((sums != sums).to(gl.int32), 0) > 0
        if spoilt:
            gl.store(mixed, 1)
            gl.atomic_or(mixed + 1 + gl.program_id(0) * gl.num_programs(1) + head, 2 << half)
    if not spoilt:  # what is to be merged again has to stay
        # A row reads a key at least. Where all its scores are -inf the output is no number, as the reference's.
        log_sum = (maximum + gl.log2(total)) * LN2
        gl.store(lse + rows.to(gl.int64) * lse_row + head, log_sum, mask=rows < tile[1])
        acc = acc / gl.convert_layout(total, gl.SliceLayout(1, OUT))[:, None]
        if MERGE:
            offsets, there = _offsets(first_row, tile[1], head, out_row, out_head, OUT, HEAD_DIM)
            gl.store(out + offsets, acc, mask=there)
        else:
            q_tile.store(acc.to(ELEMENT))  # through shared memory, for whole rows to be stored at a time
            offsets, there = _offsets(first_row, tile[1], head, out_row, out_head, WIDE, HEAD_DIM)
            gl.store(out + offsets, q_tile.load(WIDE), mask=there)


@gluon.jit
def _offsets(first_row, stop, head, stride_row, stride_head, LAYOUT: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Where the elements [M, D] of a head's rows from `first_row` on lie, and which of them are below row `stop`."""
    row = first_row + gl.arange(0, HALF, layout=gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    wide_head = gl.to_tensor(head).to(gl.int64)
    return row.to(gl.int64)[:, None] * stride_row + wide_head * stride_head + column, (row < stop)[:, None]


@gluon.jit
def _mask(scores, place, n, end, rows, lowest_key):
    """Leave the scores of the keys that a row sees, as in `forward_kernel`; -inf elsewhere, NaN scores included."""
    key = n + gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, scores.type.layout))[None, :]
    first_key = gl.where(place == OWN, lowest_key, 0)[:, None]
    last_key = gl.where(place == OWN, rows, end - 1)[:, None]
    return gl.where((key >= first_key) & (key <= last_key), scores, float("-inf"))


@gluon.jit
def _softmax(scores, maximum, total, scale):
    """(weights [M, N], what fades the sums so far, the new maximum, the new total)."""
    new_maximum = gl.maximum(maximum, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new_maximum[:, None])
    fade = gl.exp2(maximum - new_maximum)
    return weights, fade, new_maximum, total * fade + gl.sum(weights, 1)


@lru_cache
def block_layout(rows: int, head_dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How blocks of so many rows lie in shared memory."""
    element = gl.bfloat16 if dtype is torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([rows, 1, head_dim], element)


def launch_hopper_forward(
    q: Tensor,
    local: KV,
    received: KV,
    out: Tensor,
    lse: Tensor,
    tables: tuple[Tensor, Tensor, Tensor],
    mixed: Tensor,
    scale: float,
    merge: bool,
) -> bool:
    """Launch it and return whether it could be: TMA wants rows and heads that begin at multiples of 16 bytes, and rows
    a whole number of heads apart.

    tables: of query tiles of 128 rows, each with a row to read. mixed: see `kernels/blocks.py`. scale: of
    the scores, times log2(e). merge: go on from `out` (fp32) and `lse`.
    """
    both = (*local, *(received if len(received.k) else local))  # a descriptor of nothing cannot be made
    if not len(local.k) or not all(is_aligned(x) for x in both):
        return False
    layout = block_layout(BLOCK_N, q.shape[2], q.dtype)
    keys = [TensorDescriptor.from_tensor(x, [BLOCK_N, 1, q.shape[2]], layout) for x in both]
    strides = (*q.stride()[:2], *out.stride()[:2], lse.stride(0))
    hopper_forward_kernel[len(tables[0]), q.shape[1]](
        q, *keys, out, lse, *tables, mixed, scale, *strides, q.shape[1] // local.k.shape[1], STAGES, merge, **OPTIONS
    )
    return True


def is_aligned(x: Tensor) -> bool:
    """Whether TMA can read [rows, heads, head_dim]: see `launch_hopper_forward`."""
    row, head = (stride * x.element_size() for stride in x.stride()[:2])
    aligned = x.data_ptr() % _ALIGNED == row % _ALIGNED == head % _ALIGNED == 0
    return aligned and row > 0 and head > 0 and row % head == 0
