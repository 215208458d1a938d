"""The Triton kernels on a GPU: bf16 errors, repeatability, and no waiting for the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import flashcp
from flashcp.kernels.schedule import whole_pack_schedule
from flashcp.kernels.tuning import Pass, architecture, choose, tile_heads
from tests.packs import AWKWARD, gradient_terms, random_qkv, relative_error

pytestmark = pytest.mark.gpu
LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Of an error next to the result, where that is not 0."""
SHARE = {torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 1e-3}
"""Of an error of dQ and dK next to their terms, also where these cancel (documents of one row: both are 0). fp32: 16
roundings; products in fp32 lose 1e-8, one in tf32 2e-5 to 8e-5 (`tests/test_packs.py`)."""


def run(lengths: tuple[int, ...], heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    *qkv, grad = (x.cuda() for x in random_qkv(sum(lengths), *heads, head_dim, dtype, seed=1))
    leaves = [x.requires_grad_() for x in qkv]
    out = flashcp.varlen_attention(*leaves, lengths)
    return [out, *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("lengths", [*AWKWARD, (1000, 24), (32,) * 40], ids=str)
def test_matches_the_reference_and_repeats(lengths: tuple[int, ...], head_dim: int, dtype: torch.dtype) -> None:
    check_and_repeat(lengths, (4, 2), head_dim, dtype)


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("heads", [(8, 2), (8, 1), (6, 1)], ids=str)
def test_heads_that_share_a_tile(heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    lengths = (70, 66, 5, 3, 100, 17) * 6
    schedule, group = whole_pack_schedule(np.array(lengths)), heads[0] // heads[1]
    arch = architecture(torch.device("cuda"))
    blocks = choose(Pass.BACKWARD_Q, arch, head_dim, dtype, schedule, group)
    assert tile_heads(Pass.BACKWARD_Q, blocks, schedule, group) > 1
    check_and_repeat(lengths, heads, head_dim, dtype)


def check_and_repeat(lengths: tuple[int, ...], heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    """Values and gradients against float64, twice with the same bits."""
    found, again = run(lengths, heads, head_dim, dtype), run(lengths, heads, head_dim, dtype)
    assert all(map(torch.equal, found, again))
    *qkv, grad = random_qkv(sum(lengths), *heads, head_dim, dtype, seed=1)
    exact = [x.double().requires_grad_() for x in qkv]
    out = flashcp.reference_attention(*exact, lengths)
    wanted = (out, *torch.autograd.grad(out, exact, grad.double()))
    for value, expected in zip(found, wanted, strict=True):
        if expected.any():
            assert relative_error(value.cpu(), expected) < LIMIT[dtype]
    for value, expected, terms in zip(found[1:3], wanted[1:3], gradient_terms(qkv, grad, lengths), strict=True):
        assert (value.cpu().double() - expected).norm() < SHARE[dtype] * terms.norm()


# torch says so itself, once, when the mode is set
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_the_host_never_waits() -> None:
    run((100, 28), (4, 2), 64, torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_on_device = [torch.randn(128, n, 64, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2)]
        leaves = [x.requires_grad_() for x in run_on_device]
        out = flashcp.varlen_attention(*leaves, [90, 38])  # a new pack: its tables go over too
        torch.autograd.grad(out.sum(), leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_beyond_the_results_is_small() -> None:
    lengths = (8192,)
    q, k, v, grad = (x.cuda() for x in random_qkv(8192, 8, 8, 128, torch.bfloat16, seed=0))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        grads = torch.autograd.grad(flashcp.varlen_attention(*leaves, lengths), leaves, grad)
        extra = torch.cuda.max_memory_allocated() - before - 4 * q.nbytes - 4 * 8192 * 8
        del grads
    assert extra < 0.05 * q.nbytes
    assert whole_pack_schedule(np.array(lengths)).pairs == 8192 * 8193 // 2
