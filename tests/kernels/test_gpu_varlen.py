"""Other people's kernels on a GPU, those that are installed: ranks of real plans against the float64 reference.

The same checks run on the CPU with its kernel, so that on the day there is a GPU only the kernels are new.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import flashcp
from flashcp import Mask
from flashcp.kernels.interface import KV
from flashcp.kernels.varlen import KERNELS
from flashcp.kernels.varlen.attention import VarlenAttention
from tests.kernels.one_rank import Rank
from tests.packs import random_qkv, relative_error

LENGTHS = (13, 1, 300, 2, 197, 64)
HERE = [pytest.param("sdpa", "cpu", id="cpu")]
HERE += [pytest.param(name, "cuda", id=name, marks=pytest.mark.gpu) for name in KERNELS if name != "sdpa"]
BF16_LIMIT = 1e-2


def errors(
    kernel: str,
    device: str,
    strategy: str,
    exchange: str,
    heads: tuple[int, int],
    head_dim: int,
    masks: list[Mask] | None = None,
    softcap: float = 0.0,
) -> list[float]:
    """Of the output and, where the kernel has a backward, of the gradients, put together from three ranks."""
    attention, scale = VarlenAttention(KERNELS[kernel]), head_dim**-0.5
    backward = not KERNELS[kernel].no_backward()
    plan = flashcp.plan(LENGTHS, 3, strategy, masks=masks)
    *qkv, grad = random_qkv(sum(LENGTHS), *heads, head_dim, torch.bfloat16, seed=head_dim)
    totals = [torch.zeros(x.shape, dtype=torch.float64) for x in (qkv[0], *qkv)]
    for rank in range(1 if exchange == "ulysses" else 3):
        state = Rank(plan, exchange, rank, qkv, grad)
        q, grad_out = state.q.to(device), state.grad.to(device)
        local, received = (KV(*(x.to(device) for x in kv)) for kv in (state.local, state.from_others))
        out, lse = attention.attend(q, local, received, state.whole, scale, softcap=softcap)
        parts, part_lse = torch.zeros(q.shape, device=device), torch.full(q.shape[:2], -torch.inf, device=device)
        for part in state.parts:
            attention.merge_into(parts, part_lse, q, local, received, part, scale, softcap)
        assert relative_error(parts, out) < BF16_LIMIT
        assert torch.allclose(part_lse, lse, atol=1e-2)
        totals[0][state.rows] = out.cpu().double()
        if not backward:
            continue
        arguments = grad_out, q, local, received, out, lse, state.whole, scale
        found = attention.gradients(*arguments, softcap=softcap)
        if kernel != "cudnn":  # which has no deterministic backward
            again = attention.gradients(*arguments, softcap=softcap)
            assert all(
                map(torch.equal, (found.q, *found.local, found.received), (again.q, *again.local, again.received))
            )
        totals[1][state.rows] = found.q.cpu().double()
        for total, own, others in zip(totals[2:], found.local, found.received.cpu().unbind(1), strict=True):
            total.index_add_(0, state.rows, own.cpu().double())
            total.index_add_(0, state.sent, others[state.slots].double())
    exact = [x.double().requires_grad_() for x in qkv]
    expected = flashcp.reference_attention(*exact, LENGTHS, masks=masks, softcap=softcap or None)
    wanted: tuple[Tensor, ...] = (expected, *torch.autograd.grad(expected, exact, grad.double()))
    return [relative_error(a, b) for a, b in zip(totals, wanted, strict=True)][: 4 if backward else 1]


@pytest.mark.parametrize(("kernel", "device"), HERE)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_ranks_of_plans_match_the_reference(kernel: str, device: str, heads: tuple[int, int], head_dim: int) -> None:
    if not KERNELS[kernel].is_available(torch.device(device)):
        pytest.skip(f"{kernel} is not installed for this device")
    for strategy, exchange in (("flashcp", "exact"), ("per_document", "all_gather"), ("contiguous", "ulysses")):
        assert max(errors(kernel, device, strategy, exchange, heads, head_dim)) < BF16_LIMIT, (strategy, exchange)


@pytest.mark.parametrize(("kernel", "device"), HERE)
def test_windows_full_documents_and_softcap_match_the_reference(kernel: str, device: str) -> None:
    if not KERNELS[kernel].is_available(torch.device(device)):
        pytest.skip(f"{kernel} is not installed for this device")
    window = Mask("window", 40) if KERNELS[kernel].has_windows() else Mask()
    masks = [window, Mask("full"), window, Mask(), window, Mask("full")]
    softcap = 5.0 if KERNELS[kernel].has_softcap() else 0.0
    for strategy, exchange in (("flashcp", "exact"), ("per_document", "all_gather"), ("contiguous", "ulysses")):
        found = errors(kernel, device, strategy, exchange, (4, 2), 64, masks, softcap)
        assert max(found) < BF16_LIMIT, (strategy, exchange)


# torch says so itself, once, when the mode is set
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.gpu
def test_the_host_never_waits() -> None:
    """torch's own kernel, which is always there; a new pack, so that its tables go over too."""

    def run(lengths: list[int]) -> None:
        q, k, v, grad = (x.cuda() for x in random_qkv(sum(lengths), 4, 2, 64, torch.bfloat16, seed=0))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = flashcp.varlen_attention(*leaves, lengths, "varlen:torch_flash")
            torch.autograd.grad(out, leaves, grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    run([100, 28])
    run([90, 38])
