"""Packs with fewer tokens than ranks, or hardly more: ranks without rows take part in everything."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import flashcp
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from tests.interpreter import interpreted_cases
from tests.packs import random_qkv, relative_error
from tests.ranks import run_cases

PACKS = ((1,), (2,), (1, 1), (3,), (1, 2), (4,), (2, 1, 2), (1,) * 6, (7,), (3, 4))
RECEIVING = ("exact", "compacted", "all_gather", "ring")
Case = tuple[tuple[int, ...], str, str, int, str, str, str, str]


def covering(world_size: int) -> list[Case]:
    """Every strategy with every exchange and three packs; the other settings are drawn."""
    draw, cases = random.Random(world_size), []
    for i, (strategy, exchange) in enumerate(3 * list(itertools.product(flashcp.strategies(), EXCHANGE_CLASSES))):
        lengths = PACKS[(i + i // 30) % len(PACKS)]
        head_ranks = draw.choice([one for one in (1, 1, 2, 3, 4) if world_size % one == 0])
        transport = draw.choice(("shm", "gloo"))
        waits = transport == "shm" and exchange not in ("ring", "ulysses")
        how = [("none", "staged", *["fused"] * waits), ("keep", "refetch"), ("cpu", "varlen")]
        overlap, backward, attention = map(draw.choice, how)
        attention = "cpu" if overlap == "fused" else attention
        cases.append((lengths, strategy, exchange, head_ranks, transport, overlap, backward, attention))
    return cases


def errors_on_rank(
    lengths: tuple[int, ...],
    strategy: str,
    exchange: str,
    head_ranks: int,
    transport: str,
    overlap: str,
    backward: str,
    attention: str,
) -> float:
    """The largest relative error of all that a rank gets back, by every way that rows can go."""
    cp = flashcp.ContextParallel(
        exchange=exchange,
        overlap=overlap,
        backward=backward,
        transport=transport,
        attention=attention,
        head_ranks=head_ranks,
        timeout_s=20,
    )
    plan, tokens = flashcp.plan(lengths, cp.holders, strategy), sum(lengths)
    q, k, v, grad = random_qkv(tokens, 24, 12, 8, torch.float32, 0)
    local = [cp.shard(x, plan).requires_grad_() for x in (q, k, v)]
    positions = torch.cat([torch.arange(length) for length in lengths])
    assert torch.equal(cp.position_ids(plan), cp.shard(positions, plan))
    whole = [x.double().requires_grad_() for x in (q, k, v)]
    reference = flashcp.reference_attention(*whole, lengths)
    expected = (reference, *torch.autograd.grad(reference, whole, grad.double()))

    def errors(out: torch.Tensor) -> list[float]:
        gradients = torch.autograd.grad(out, local, cp.shard(grad, plan))
        got = [cp.unshard(x.detach(), plan) for x in (out, *gradients)]
        return list(map(relative_error, got, expected))

    out, lse = cp.attention(*local, plan, return_lse=True)
    _, sums = flashcp.varlen_attention(q, k, v, lengths, return_lse=True)
    assert torch.allclose(lse, cp.shard(sums, plan), atol=1e-5)
    found = errors(out) + errors(cp.prefetch(*local[1:], plan).attention(local[0]))
    if head_ranks == 1:
        other = flashcp.plan([tokens], cp.holders, "contiguous")
        x = cp.shard(grad, plan).requires_grad_()
        there = cp.reshard(x, plan, other)
        assert torch.equal(there, cp.shard(grad, other))
        (home,) = torch.autograd.grad(there, x, cp.shard(q, other))
        assert torch.equal(home, cp.shard(q, plan))
    if head_ranks == 1 and exchange in RECEIVING:
        received = cp.gather(torch.stack(local[1:], dim=1), plan)
        found += errors(cp.attend(*local, *received.unbind(1), plan))
    cp.synchronize()
    return max(found)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_strategy_and_exchange_matches_the_reference(world_size: int) -> None:
    cases = covering(world_size)
    for case, ranks in zip(cases, run_cases(errors_on_rank, world_size, cases), strict=True):
        assert max(ranks) < 1e-5, case


def test_triton_kernels_of_ranks_without_rows() -> None:
    cases = [
        ((1,), "flashcp", "exact", 1, "shm", "staged", "keep", "triton"),
        ((2,), "contiguous", "ring", 1, "gloo", "none", "refetch", "triton"),
    ]
    for case, ranks in zip(cases, interpreted_cases(errors_on_rank, 3, cases), strict=True):
        assert max(ranks) < 1e-5, case
