"""Rows that are verified come to the same numbers, over every exchange and operation."""

from __future__ import annotations

import pytest
import torch

import flashcp
from flashcp.comm.errors import PlanMismatchError
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from tests.packs import random_qkv
from tests.ranks import run_cases, run_ranks

LENGTHS = (61, 5, 30)


def numbers(transport: str, exchange: str, head_ranks: int, backward: str, verify_rows: bool) -> list[torch.Tensor]:
    """Of two layers under a plan, and of rows of other kinds."""
    cp = flashcp.ContextParallel(
        exchange=exchange, transport=transport, head_ranks=head_ranks, backward=backward, timeout_s=20,
        verify_rows=verify_rows,
    )  # fmt: skip
    plan = flashcp.plan(LENGTHS, cp.holders, "per_document")
    q, k, v, grad = random_qkv(sum(LENGTHS), 4, 4, 8, torch.float32, seed=1)
    local = [cp.shard(x, plan).requires_grad_() for x in (q, k, v)]
    cp.prefetch(*local[1:], plan)  # thrown away
    out = cp.attention(cp.attention(*local, plan), *local[1:], plan)
    full = cp.unshard(out, plan)
    full.backward(grad)
    found = [full.detach(), *(x.grad for x in local)]
    if head_ranks == 1 and exchange != "ulysses":
        order = flashcp.plan([sum(LENGTHS)], cp.world_size, "contiguous")
        moved = cp.reshard(local[0], plan, order)
        rows = cp.gather(moved, order)
        found += [moved.detach(), rows.detach(), *torch.autograd.grad(rows.sum() + moved.sum(), local[0])]
    cp.synchronize()
    cp.close()
    return found


@pytest.mark.parametrize("transport", ["shm", "gloo"])
@pytest.mark.parametrize(("ranks", "head_ranks"), [(3, 1), (4, 2), (2, 2)])
def test_verified_rows_give_the_same_bits(transport: str, ranks: int, head_ranks: int) -> None:
    exchanges = [each for each in EXCHANGE_CLASSES if each != "ulysses" or ranks != 3]
    kept = ["keep", "refetch"] if head_ranks == 1 else ["keep"]
    cases = [
        (transport, exchange, head_ranks, backward, verify_rows)
        for exchange in exchanges
        for backward in kept
        for verify_rows in (False, True)
    ]
    answers = run_cases(numbers, ranks, cases)
    for case, plain, verified in zip(cases[::2], answers[::2], answers[1::2], strict=True):
        for of_rank, expected in zip(verified, plain, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(of_rank, expected, strict=True)), case


def only_rank_1_verifies(transport: str) -> str:
    import torch.distributed as dist

    cp = flashcp.ContextParallel(transport=transport, timeout_s=20, verify_rows=dist.get_rank() == 1)
    plan = flashcp.plan(LENGTHS, 2, "per_document")
    x = cp.shard(torch.zeros(sum(LENGTHS), 2, 8), plan)
    with pytest.raises(PlanMismatchError) as raised:
        cp.attention(x, x, x, plan)
    return str(raised.value)


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_ranks_that_disagree_on_it_are_named(transport: str) -> None:
    for said in run_ranks(only_rank_1_verifies, 2, transport):
        assert "ranks disagree on verify rows (call 1): rank 0 0; rank 1 1" in said
