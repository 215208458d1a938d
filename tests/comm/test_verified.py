"""Rows that are verified come to the same numbers, over every exchange and operation; who tells of others, and when."""

from __future__ import annotations

import re
import time

import pytest
import torch
import torch.distributed as dist

import flashcp
from flashcp.comm.errors import ExchangeError, ExchangeTimeoutError, PlanMismatchError, RowsDifferError
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from tests.faults import Fault, faulty
from tests.flashcp.test_agreement import message
from tests.like_nccl import like_nccl
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
    cp = flashcp.ContextParallel(transport=transport, timeout_s=20, verify_rows=dist.get_rank() == 1)
    plan = flashcp.plan(LENGTHS, 2, "per_document")
    x = cp.shard(torch.zeros(sum(LENGTHS), 2, 8), plan)
    with pytest.raises(PlanMismatchError) as raised:
        cp.attention(x, x, x, plan)
    return str(raised.value)


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_ranks_that_disagree_on_it_are_named(transport: str) -> None:
    for said in run_ranks(only_rank_1_verifies, 2, transport):
        assert "ranks disagree on verify rows (call 1): rank 0 no; rank 1 yes" in said


def of_operation(transport: str, operation: str, backward: bool) -> str:
    """What is said, by `synchronize` at the latest, where rows that an operation sends are corrupted."""
    with faulty(Fault("corrupt", what=WHAT[operation][backward], nth=int(backward and operation != "gather"))):
        cp = flashcp.ContextParallel(transport=transport, timeout_s=20, verify_rows=True)
    plan, order = (flashcp.plan(lengths, 3, "per_document") for lengths in (LENGTHS, (sum(LENGTHS),)))
    x = cp.shard(torch.ones(sum(LENGTHS), 4), plan).requires_grad_()
    arguments = (x, plan, order) if operation == "reshard" else (x, plan)

    def step() -> None:
        getattr(cp, operation)(*arguments).sum().backward()
        cp.synchronize()

    return message(RowsDifferError, step)


WHAT = {"unshard": ("rows", "rows"), "reshard": ("resharded rows",) * 2, "gather": ("rows", "gradients")}
"""Names of what travels forward and backward."""


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_every_operation_is_verified(transport: str) -> None:
    cases = [(transport, operation, backward) for operation in WHAT for backward in (False, True)]
    for case, ranks in zip(cases, run_cases(of_operation, 3, cases), strict=True):
        assert all(re.search(r"received rows of rank 1 .*\(call 1\)", said) for said in ranks), (case, ranks)


def last_call(transport: str) -> tuple[str, str]:
    """Rows of the last call are corrupted: what closing says, and an earlier operator's next call that is all right."""
    with faulty(Fault("corrupt", nth=0)):
        cp, other = (flashcp.ContextParallel(transport=transport, timeout_s=20, verify_rows=True) for _ in range(2))
    plan = flashcp.plan(LENGTHS, 2, "per_document")
    x = cp.shard(torch.ones(sum(LENGTHS), 2, 8), plan)
    cp.attention(x, x, x, plan)
    other.attention(x, x, x, plan)
    said = message(RowsDifferError, other.synchronize)
    assert "rank 0 received rows of rank 1" in said
    return message(RowsDifferError, cp.close), message(ExchangeError, other.attention, x, x, x, plan)


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_closing_tells_the_reader_and_two_sided_ranks_go_on(transport: str) -> None:
    (reader, after), (sender, _) = run_ranks(last_call, 2, transport)
    assert reader == "rank 0 received rows of rank 1 that are not those that were sent (call 1)"
    assert sender == "nothing was raised"
    assert after.startswith("nothing" if transport == "gloo" else "ranks came apart at an earlier error")


def over_nccl() -> str:
    with like_nccl():
        return message(ValueError, lambda: flashcp.ContextParallel(transport="nccl", verify_rows=True))


def test_transports_whose_rows_a_stream_awaits_are_refused() -> None:
    assert run_ranks(over_nccl, 2)[0].startswith("verify_rows=True over nccl: expected a transport")


def reshard_without_rows() -> tuple[str, str]:
    """Rows of rank 1 stay away, in an operation that is no attention: what ranks say then and in their next call."""
    with faulty(Fault("drop", what="resharded rows", nth=0)):
        cp = flashcp.ContextParallel(transport="shm", timeout_s=2)
    plan, order = (flashcp.plan(lengths, 3, "per_document") for lengths in (LENGTHS, (sum(LENGTHS),)))
    x = cp.shard(torch.ones(sum(LENGTHS), 4), plan)
    said = message(ExchangeTimeoutError, cp.reshard, x, plan, order)
    time.sleep(0.1)
    return said, message(ExchangeError, cp.reshard, x, plan, order)


def test_a_failure_of_any_operation_names_its_call_and_reaches_the_others() -> None:
    first, second = zip(*run_ranks(reshard_without_rows, 3), strict=True)
    (reader,) = (rank for rank, said in enumerate(first) if said != "nothing was raised")
    assert re.fullmatch(rf"rank {reader} waited 2 s for the rows of rank 1 \(epoch 1\) \(call 1\)", first[reader])
    for rank, said in enumerate(second):
        assert rank == reader or f"rank {reader} stopped with an error" in said
