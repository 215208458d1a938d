"""The Triton kernels, interpreted, against the float64 reference: values and gradients of all ranks of real plans."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import flashcp
from flashcp.kernels.interface import KV
from flashcp.kernels.schedule import Schedule, whole_pack_schedule
from flashcp.kernels.selection import select_attention
from flashcp.kernels.tuning import Blocks, Pass, Tuning, tile_heads
from flashcp.sharding.plan import ShardingPlan
from tests.interpreter import interpreted
from tests.kernels.one_rank import Rank
from tests.packs import random_lengths, random_qkv, relative_error

LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3}
SMALL = "forward=32x16x4x1xieee,backward_kv=16x32x4x1xieee,backward_q=32x16x4x1xieee"
WIDE = "forward=64x32x4x1xieee,backward_kv=32x64x4x1xieee,backward_q=16x64x4x1xieee"
TALL = "forward=16x64x4x1xieee,backward_kv=64x16x4x1xieee,backward_q=64x16x4x1xieee"

TOGETHER = "forward=64x16x4x1xieee,backward_kv=16x32x4x1xieee,backward_q=64x16x4x1xieee"


def errors(lengths: tuple[int, ...], ranks: int, strategy: str, exchange: str, staged: bool, heads: tuple[int, int],
           head_dim: int, dtype: torch.dtype, tuning: str) -> dict[str, float]:  # fmt: skip
    """Relative errors of the output and the gradients of a whole pack, put together from all its ranks."""
    plan = flashcp.plan(lengths, ranks, strategy)
    *qkv, grad = random_qkv(sum(lengths), *heads, head_dim, dtype, seed=sum(lengths))
    kernel, scale = select_attention("triton", torch.device("cpu"), Tuning.from_text(tuning)), head_dim**-0.5
    out, grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=torch.float64) for x in (qkv[0], *qkv))
    for rank in range(1 if exchange == "ulysses" else ranks):
        state = Rank(plan, exchange, rank, qkv, grad)
        part, part_q, local, back = (state.staged if staged else state.one_launch)(kernel, scale)
        out[state.rows], grad_q[state.rows] = part.double(), part_q.double()
        for total, own, others in zip((grad_k, grad_v), local, back.unbind(1), strict=True):
            total.index_add_(0, state.rows, own.double())
            total.index_add_(0, state.sent, others[state.slots].double())
    exact = [x.double().requires_grad_() for x in qkv]
    expected = flashcp.reference_attention(*exact, lengths)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    found = zip(("out", "q", "k", "v"), (out, grad_q, grad_k, grad_v), (expected, *wanted), strict=True)
    return {name: relative_error(a, b) for name, a, b in found}


fp32, fp16 = torch.float32, torch.float16
ALONE = (1, "contiguous", "exact", False)
CASES = {
    "singles": ((1,) * 7, *ALONE, (2, 2), 16, fp32, SMALL),
    "tiny documents share tiles": (tuple(1 + i % 5 for i in range(40)), *ALONE, (4, 2), 16, fp32, SMALL),
    "127 and 129": ((1, 127, 129), *ALONE, (2, 1), 32, fp32, WIDE),
    "tall": ((70, 3, 3, 64, 1), *ALONE, (2, 1), 32, fp16, TALL),
    "fp16 128": ((61, 7), *ALONE, (2, 2), 128, fp16, WIDE),
    "odd dim 80": ((33, 18), *ALONE, (2, 1), 80, fp32, SMALL),
    "odd dim 96": ((33, 18), *ALONE, (2, 1), 96, fp16, WIDE),
    "dim 256": ((35,), *ALONE, (1, 1), 256, fp32, SMALL),
    "dim 64": ((5, 45), *ALONE, (3, 1), 64, fp32, TALL),
    "257 on two": ((257,), 2, "per_document", "exact", False, (1, 1), 16, fp32, WIDE),
    "exact": ((13, 1, 53, 2, 47), 3, "per_document", "exact", False, (4, 2), 16, fp32, SMALL),
    "exact fp16 80": ((13, 1, 53, 2), 2, "per_document", "exact", False, (2, 1), 80, fp16, WIDE),
    "exact staged": ((13, 1, 53, 2, 47), 2, "per_document", "exact", True, (4, 2), 16, fp32, SMALL),
    "all_gather": ((1, 1, 100, 1, 1), 2, "per_sequence", "all_gather", False, (2, 2), 16, fp32, SMALL),
    "compacted": (random_lengths(3), 4, "flashcp_paper", "compacted", False, (2, 1), 16, fp32, SMALL),
    "ring by blocks": ((40, 7, 61), 3, "per_sequence", "sources", True, (2, 1), 16, fp32, SMALL),
    "fp16 staged": ((40, 31), 2, "contiguous", "exact", True, (2, 1), 32, fp16, TALL),
    "dim 72, padded in its second part": ((33, 18), *ALONE, (2, 1), 72, fp32, SMALL),
    "dim 192": ((19, 18), *ALONE, (2, 1), 192, fp32, SMALL),
    "heads share a tile": ((20, 19, 7, 3, 30), *ALONE, (8, 2), 16, fp32, TOGETHER),
    "two of six heads share a tile, 80": ((17, 20, 19), *ALONE, (6, 1), 80, fp32, TOGETHER),
    "heads share a tile on three": ((13, 1, 53, 20, 47), 3, "per_document", "exact", False, (4, 1), 16, fp16, TOGETHER),
    "heads share a tile, staged": ((13, 1, 53, 2, 47), 2, "per_document", "exact", True, (4, 1), 16, fp32, TOGETHER),
    "ulysses": ((40, 7, 61), 3, "per_document", "ulysses", False, (2, 1), 16, fp32, WIDE),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_the_reference(case: tuple) -> None:
    found = interpreted(errors, *case)
    assert max(found.values()) < LIMIT[case[-2]], found


@pytest.mark.parametrize("case", [x for x in CASES.values() if x[-1] == TOGETHER])
def test_heads_share_a_tile_where_a_case_says_so(case: tuple) -> None:
    lengths, ranks, strategy, exchange, _, (heads, kv_heads), head_dim, dtype, _ = case
    plan = flashcp.plan(lengths, ranks, strategy)
    *qkv, grad = random_qkv(sum(lengths), heads, kv_heads, head_dim, dtype, seed=0)
    blocks = Blocks(64, 16, 4, 1)
    for rank in range(ranks):
        schedule = Rank(plan, exchange, rank, qkv, grad).whole
        assert tile_heads(Pass.FORWARD, blocks, schedule, heads // kv_heads) in (2, 4)


def nothing_to_read() -> None:
    """Queries whose ranges are all elsewhere, and key rows that nobody reads."""
    plan = ShardingPlan.from_shards([40, 24], 2, [(0, 0, 32, 0), (0, 32, 40, 1), (1, 0, 24, 1)])
    *qkv, grad = random_qkv(64, 2, 1, 16, fp32, seed=0)
    state = Rank(plan, "all_gather", 1, qkv, grad)
    received: Schedule = state.parts[1]
    read = torch.zeros(32, dtype=torch.bool)
    read[int(received.query_start[0]) : int(received.query_stop[0])] = True
    assert 0 < int(read.sum()) < 32
    kernel = select_attention("triton", torch.device("cpu"), Tuning(forward=Blocks(32, 16, 4, 1)))
    out, lse = kernel.attend(state.q, state.local, state.from_others, received, 0.25)
    assert out[read].isfinite().all()
    assert out[read].count_nonzero()
    assert out[~read].count_nonzero() == 0
    assert (lse[~read] == -torch.inf).all()
    grads = kernel.gradients(state.grad, state.q, state.local, state.from_others, out, lse, received, 0.25)
    assert grads.q[read].count_nonzero()
    assert grads.q[~read].count_nonzero() == 0
    assert grads.local.k.count_nonzero() == grads.local.v.count_nonzero() == 0
    assert grads.received[:32].count_nonzero()
    assert grads.received.isfinite().all()
    assert grads.received.dtype == fp32


def test_rows_with_nothing_to_read_are_zeros() -> None:
    interpreted(nothing_to_read)


def other_layouts() -> None:
    """Row and head strides of any kind; the receive buffer's halves are strided already."""
    lengths = [5, 40, 19]
    q, k, v, grad = random_qkv(64, 4, 2, 16, fp32, seed=3)

    def run(*tensors: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = flashcp.varlen_attention(*leaves, lengths, attention="triton")
        return [out, *torch.autograd.grad(out, leaves, grad)]

    strided = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in (q, k, v)]
    sliced = [torch.stack((x, x.neg()), dim=1)[:, 0] for x in (q, k, v)]
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    for other in (strided, sliced, by_head):
        assert not other[0].is_contiguous()
        assert all(map(torch.equal, run(q, k, v), run(*other)))


def test_any_layout_gives_the_same_numbers() -> None:
    interpreted(other_layouts)


def bf16_on_a_cpu() -> None:
    q, k, v, grad = random_qkv(8, 1, 1, 16, torch.bfloat16, seed=0)
    with pytest.raises(
        ValueError, match=r"q is torch\.bfloat16 on the CPU.*: expected torch\.float32 or torch\.float16"
    ):
        flashcp.varlen_attention(q, k, v, [8], attention="triton")
    kernel, schedule = select_attention("triton", torch.device("cpu")), whole_pack_schedule(np.array([8]))
    local, out, lse = KV(k, v), torch.zeros(8, 1, 16), torch.zeros(8, 1)
    with pytest.raises(ValueError, match=r"q is torch\.bfloat16 on the CPU"):
        kernel.merge_into(out, lse, q, local, local, schedule, 0.25)
    with pytest.raises(ValueError, match=r"q is torch\.bfloat16 on the CPU"):
        kernel.gradients(grad, q, local, local, out, lse, schedule, 0.25)


def test_bf16_which_the_interpreter_computes_wrongly_is_refused() -> None:
    interpreted(bf16_on_a_cpu)
