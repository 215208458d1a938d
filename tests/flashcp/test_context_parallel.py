"""Every strategy x exchange x world size against the float64 reference: values, gradients, repeatability."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

import flashcp
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.kernels.tuning import Tuning
from flashcp.sharding.route import GRADIENT_WIRES
from tests.interpreter import interpreted_cases
from tests.packs import AWKWARD, random_lengths, random_qkv, relative_error
from tests.ranks import run_cases

BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
HEADS = {"mha": (12, 12), "gqa": (24, 12), "few": (4, 2), "half": (12, 2), "one": (12, 1)}
"""1, 2, 3 and 4 ranks divide all but the last three: ulysses takes part."""
TUNING = Tuning.from_text("forward=32x16x4x1,backward_kv=16x32x4x1,backward_q=16x16x4x1")  # several tiles a shard


def errors_on_rank(
    lengths: tuple[int, ...],
    strategy: str,
    exchange: str,
    heads: str,
    dtype: torch.dtype,
    overlap: str = "auto",
    backward: str = "keep",
    seed: int = 0,
    transport: str = "auto",
    attention: str = "auto",
    gradient_wire: str = "auto",
) -> dict[str, float]:
    """Relative errors of out and of all gradients of the whole pack, brought together from the ranks."""
    cp = flashcp.ContextParallel(
        exchange=exchange,
        overlap=overlap,
        attention=attention,
        transport=transport,
        backward=backward,
        gradient_wire=gradient_wire,
        timeout_s=20,
        tuning=TUNING,
    )
    plan = flashcp.plan(lengths, cp.world_size, strategy)
    q, k, v, grad = random_qkv(sum(lengths), *HEADS[heads], 16, dtype, seed)
    local = [cp.shard(x, plan).requires_grad_() for x in (q, k, v)]
    out = cp.attention(*local, plan)
    assert out.dtype == dtype
    gradients = torch.autograd.grad(out, local, cp.shard(grad, plan))
    whole = [x.double().requires_grad_() for x in (q, k, v)]
    reference = flashcp.reference_attention(*whole, lengths)
    expected = (reference, *torch.autograd.grad(reference, whole, grad.double()))
    got = [cp.unshard(x.detach(), plan) for x in (out, *gradients)]
    return dict(zip(("out", "q", "k", "v"), map(relative_error, got, expected), strict=True))


def check(world_size: int, cases: list[tuple], bound: float, run: Callable = run_cases) -> None:
    for case, ranks in zip(cases, run(errors_on_rank, world_size, cases), strict=True):
        for rank, errors in enumerate(ranks):
            assert max(errors.values()) < bound, f"rank {rank} of {world_size}, {case}: {errors}"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", list(BOUND), ids=["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["cpu", "varlen"])
def test_every_strategy_and_exchange_matches_the_reference(world_size: int, dtype: torch.dtype, attention: str) -> None:
    """Every strategy with every exchange; half of them with MHA, the others with GQA, and the other way round with the
    next number of ranks, the next dtype and the next kernel."""
    cases, turn = [], world_size + list(BOUND).index(dtype) + (attention == "varlen")
    for i, (strategy, exchange) in enumerate(itertools.product(flashcp.strategies(), EXCHANGE_CLASSES)):
        heads = ("mha", "gqa")[(i + turn) % 2]
        lengths = random_lengths(100 * world_size + i) if i // 2 % 2 else AWKWARD[i // 4 % len(AWKWARD)]
        wire = GRADIENT_WIRES[i % 3]
        cases.append((lengths, strategy, exchange, heads, dtype, "auto", "keep", 0, "auto", attention, wire))
    check(world_size, cases, BOUND[dtype])


@pytest.mark.parametrize("exchange", list(EXCHANGE_CLASSES))
def test_overlap_and_refetch_change_nothing_but_when(exchange: str) -> None:
    cases = [
        (random_lengths(7), "per_document", exchange, "gqa", torch.float32, overlap, backward, 0, transport, attention)
        for attention in ("cpu", "varlen")
        for transport in ("gloo", "shm")
        for overlap in ("none", "staged", "fused")
        for backward in ("keep", "refetch")
        if overlap != "fused" or (transport == "shm" and exchange not in ("ring", "ulysses") and attention != "varlen")
    ]
    check(3, cases, 1e-5)


@pytest.mark.parametrize(("world_size", "heads"), [(2, "one"), (3, "one"), (4, "half"), (4, "one")])
def test_ulysses_sends_a_kv_head_to_all_who_have_queries_of_it(world_size: int, heads: str) -> None:
    for dtype, bound in BOUND.items():
        cases = [
            (random_lengths(i), strategy, "ulysses", heads, dtype, "auto", backward, i, transport)
            for i, strategy in enumerate(flashcp.strategies())
            for transport, backward in (("gloo", "keep"), ("shm", "refetch"))
        ]
        check(world_size, cases, bound)


def test_triton_kernels_on_two_ranks() -> None:
    """Interpreted: what the operator hands the kernels, plan and receive buffer, and what it does with the results."""
    triton = ("staged", "keep", 0, "auto", "triton")
    cases = [
        ((13, 1, 40, 5), "per_document", "exact", "few", torch.float32, *triton),
        ((50, 17), "flashcp_paper", "exact", "few", torch.float32, "none", "refetch", 0, "auto", "triton"),
        ((1, 61), "per_sequence", "ring", "few", torch.float32, *triton),
        ((30, 3), "contiguous", "ulysses", "few", torch.float32, *triton),
    ]
    check(2, cases, BOUND[torch.float32], interpreted_cases)


@pytest.mark.parametrize("name", ["varlen", "varlen:sdpa"])
def test_kernels_that_do_not_wait_are_staged(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"overlap='fused' with attention='{name}': expected one of auto, none, staged"
    ):
        flashcp.ContextParallel(attention=name, overlap="fused")
    assert flashcp.ContextParallel(attention=name).overlap == "staged"
