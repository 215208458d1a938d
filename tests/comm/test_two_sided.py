"""The two-sided transport: over gloo as it is, and over gloo with the calls that NCCL gets; `synchronize` of all."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import flashcp
from flashcp.comm.errors import ExchangeError, ExchangeTimeoutError
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.comm.fabrics.base import NO_PUT, Put
from flashcp.comm.fabrics.shm import ShmFabric
from flashcp.comm.transport import Alone, OutgoingRows, Transfer
from flashcp.comm.two_sided import TwoSided
from flashcp.comm.waits import StreamWaits
from tests.like_nccl import like_nccl
from tests.packs import random_qkv, relative_error
from tests.ranks import run_cases, run_ranks

LENGTHS = (61, 5, 30)
HEADS = (12, 6)  # 2 and 3 ranks divide them: ulysses takes part


def rows_of(rank: int, rows: int) -> Tensor:
    """Rows [rows, 3] that tell whose they are."""
    return 100.0 * rank + torch.arange(3 * rows, dtype=torch.float32).view(rows, 3)


def ring(backend: str, sizes: list[int]) -> tuple[bool, list[str], list[tuple[object, ...]]]:
    """Every rank's rows go all the way round. Whether they came whole, the operations, the arguments of waits."""
    with like_nccl(backend) as seen:
        transport = TwoSided(None, timeout_s=10)
        rank, ranks = transport.rank, transport.world_size
        held, right = rows_of(rank, sizes[rank]), True
        for step in range(1, ranks):
            size = sizes[(rank - step) % ranks]
            inbox = transport.inbox(size, max(sizes), (3,), held)
            transfer = transport.shift(OutgoingRows(held), inbox, 0, slice(0, size), 0)
            transfer.wait()
            transfer.leave()
            held = inbox.rows
            right &= torch.equal(held, rows_of((rank - step) % ranks, size))
        transport.synchronize()
    return right, seen.operations, seen.waits


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_rows_go_round_in_one_batch_a_step(backend: str, ranks: int) -> None:
    cases = [(backend, sizes) for sizes in ([2, 5, 1, 3][:ranks], [0, 2, 0, 4][:ranks], [3] + [0] * (ranks - 1))]
    for (_, sizes), answers in zip(cases, run_cases(ring, ranks, cases), strict=True):
        for rank, (right, operations, waits) in enumerate(answers):
            assert right, (rank, sizes)
            batches = [step for step in range(1, ranks) if sizes[rank - step] or sizes[(rank - step + 1) % ranks]]
            # The first is one that all ranks take part in: NCCL's communicator is made of all of them.
            assert operations == ["all_reduce"] * (backend == "nccl") + ["batch_isend_irecv"] * len(batches)
            assert all(given == () if backend == "nccl" else type(given[0]) is timedelta for given in waits)
            assert bool(waits) == bool(batches)


def attention_waits(exchange: str, backend: str, overlap: str) -> tuple[float, int, set[int], str]:
    """Forward and backward: the largest error, works that nobody waited for, how many arguments waits had."""
    with like_nccl(backend) as seen:
        cp = flashcp.ContextParallel(exchange=exchange, transport=backend, overlap=overlap, timeout_s=20)
        plan = flashcp.plan(LENGTHS, cp.world_size, "per_document")
        q, k, v, grad = random_qkv(sum(LENGTHS), *HEADS, 8, torch.float32, seed=1)
        local = [cp.shard(x, plan).requires_grad_() for x in (q, k, v)]
        out = cp.attention(*local, plan)
        gradients = torch.autograd.grad(out, local, cp.shard(grad, plan))
        full = cp.unshard(out.detach(), plan)
        cp._transport.synchronize()
    whole = [x.double().requires_grad_() for x in (q, k, v)]
    reference = flashcp.reference_attention(*whole, LENGTHS)
    expected = [cp.shard(x, plan) for x in torch.autograd.grad(reference, whole, grad.double())]
    error = max(map(relative_error, (full, *gradients), (reference.detach(), *expected)))
    return error, seen.started - len(seen.waits), {len(given) for given in seen.waits}, cp.transport


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_no_wait_of_a_step_has_a_time_out_over_nccl(backend: str) -> None:
    cases = [(exchange, backend, overlap) for exchange in EXCHANGE_CLASSES for overlap in ("none", "staged")]
    for case, ranks in zip(cases, run_cases(attention_waits, 3, cases), strict=True):
        for error, not_waited_for, arguments, transport in ranks:
            assert error < 1e-5, case
            assert not_waited_for == 0, case
            assert arguments == {0 if backend == "nccl" else 1}, case
            assert transport == backend


def thrown_away(backend: str, exchange: str) -> tuple[int, float]:
    """Works that nobody waited for, and the error of the call behind a handle that was thrown away."""
    with like_nccl(backend) as seen:
        cp = flashcp.ContextParallel(exchange=exchange, transport=backend, timeout_s=20)
        plan = flashcp.plan(LENGTHS, cp.world_size, "per_document")
        q, k, v, _ = random_qkv(sum(LENGTHS), *HEADS, 8, torch.float32, seed=1)
        local = [cp.shard(x, plan) for x in (q, k, v)]
        handle = cp.prefetch(*local[1:], plan)
        time.sleep(0.1 * cp.rank)
        del handle
        left = seen.started - len(seen.waits)
        found = cp.unshard(cp.attention(*local, plan), plan)
        cp._transport.synchronize()
    return left, relative_error(found, flashcp.reference_attention(q, k, v, LENGTHS))


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_rows_of_a_handle_that_is_thrown_away_still_land(backend: str) -> None:
    cases = [(backend, exchange) for exchange in EXCHANGE_CLASSES]
    for case, ranks in zip(cases, run_cases(thrown_away, 2, cases), strict=True):
        assert all(left == 0 and error < 1e-5 for left, error in ranks), case


class Never:
    """An event that the device does not come to."""

    def query(self) -> bool:
        return False


class Done:
    """An event that the device has come to."""

    def query(self) -> bool:
        return True


def until_noted(transport: TwoSided) -> None:
    """Return when the watchdog has found something."""
    deadline = time.monotonic() + 10
    while transport.waits._error is None and time.monotonic() < deadline:
        time.sleep(0.01)


def late_rows() -> list[str]:
    """What each call says after rows were late, in the stream, once."""
    marks = iter([Done(), Never()])
    said = []
    with like_nccl(), patch.object(StreamWaits, "_mark", lambda waits, home: next(marks, Done())):
        transport = TwoSided(None, timeout_s=0.1)
        ranks, block = transport.world_size, rows_of(0, 2)
        inbox = transport.inbox(2 * ranks, 2 * ranks, (3,), block)
        transport.all_gather(OutgoingRows(block, what="queries"), inbox).wait()
        until_noted(transport)
        split = [2 * (rank == 0) for rank in range(ranks)]
        calls: list[Callable[[], object]] = [
            lambda: transport.all_to_all(OutgoingRows(block), split, inbox, split, [0] * ranks),
            lambda: transport.all_gather(OutgoingRows(block), inbox),
            lambda: transport.shift(OutgoingRows(block), inbox, 0, slice(0, 2), 0),
            transport.synchronize,
        ]
        for call in calls:
            with pytest.raises(ExchangeTimeoutError) as raised:
                call()
            said.append(str(raised.value))
    return said


def test_what_the_watchdog_found_is_raised_by_every_later_call() -> None:
    for rank, said in enumerate(run_ranks(late_rows, 2)):
        assert said == [f"rank {rank} waited 0.1 s for queries of another rank, on its GPU"] * 4


def late_in_training() -> list[str]:
    """Rows of the first call are late: what the second call and `synchronize` of the operator's transport say."""
    with like_nccl(), ExitStack() as stack:
        cp = flashcp.ContextParallel(transport="nccl", timeout_s=0.5)
        plan = flashcp.plan(LENGTHS, cp.world_size, "per_document")
        q, k, v = (cp.shard(x, plan) for x in random_qkv(sum(LENGTHS), *HEADS, 8, torch.float32, seed=1)[:3])
        marks = iter([Done(), Never()])
        stack.enter_context(patch.object(StreamWaits, "_mark", lambda waits, home: next(marks, Done())))
        cp.attention(q, k, v, plan)
        assert isinstance(cp._transport, TwoSided)
        until_noted(cp._transport)
        said = []
        for call in (cp._transport.synchronize, lambda: cp.attention(q, k, v, plan)):
            with pytest.raises(ExchangeError) as raised:
                call()
            said.append(str(raised.value))
    return said


def test_late_rows_of_a_layer_are_raised_by_the_next_one() -> None:
    for rank, said in enumerate(run_ranks(late_in_training, 2)):
        assert all(text.startswith(f"rank {rank} waited 0.5 s for rows of another rank, on its GPU") for text in said)


def alone_at_the_exchange(thrown_away: bool) -> str:
    """Rank 1 stays away: what rank 0's `synchronize` says of its rows."""
    if dist.get_rank():
        return ""
    transport = TwoSided(None, timeout_s=0.3)
    inbox = transport.inbox(2, 2, (3,), torch.zeros(2, 3))
    transfer: Transfer | None = transport.shift(OutgoingRows(torch.zeros(0, 3)), inbox, 0, slice(0, 2), 0)
    if thrown_away:
        transfer = None
    with pytest.raises(ExchangeError) as raised:
        transport.synchronize()
    del transfer
    return str(raised.value)


@pytest.mark.parametrize("thrown_away", [False, True])
def test_synchronize_waits_for_what_is_under_way_and_tells_of_what_was_thrown_away(thrown_away: bool) -> None:
    assert run_ranks(alone_at_the_exchange, 2, thrown_away)[0] == "rank 0 waited 0.3 s for rows of rank 1"


def under_way(backend: str) -> bool:
    """Rows that nobody waited for are there after `synchronize`."""
    with like_nccl(backend):
        transport = TwoSided(None, timeout_s=10)
        rank, ranks = transport.rank, transport.world_size
        time.sleep(0.2 * rank)
        inbox = transport.inbox(ranks, ranks, (3,), torch.zeros(1, 3))
        transfer = transport.all_gather(OutgoingRows(rows_of(rank, 1)), inbox)
        transport.synchronize()
        right = torch.equal(inbox.rows, torch.cat([rows_of(each, 1) for each in range(ranks)]))
        transfer.wait()
    return right


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_after_synchronize_rows_are_there(backend: str) -> None:
    assert run_ranks(under_way, 3, backend) == [True] * 3


def puts_under_way(fails: bool) -> tuple[int, str]:
    """Over shared memory, with slow puts or broken ones: the oldest put after `synchronize`, and what it said."""
    cp = flashcp.ContextParallel(transport="shm", timeout_s=10)
    plan = flashcp.plan(LENGTHS, cp.world_size, "per_document")
    _, k, v = (cp.shard(x, plan) for x in random_qkv(sum(LENGTHS), *HEADS, 8, torch.float32, seed=1)[:3])
    carry = ShmFabric._carry

    def slow(fabric: ShmFabric, put: Put) -> None:
        time.sleep(0.1)
        if fails:
            raise OSError("no such memory")
        carry(fabric, put)

    with patch.object(ShmFabric, "_carry", slow):
        handle = cp.prefetch(k, v, plan)
        assert cp._transport.oldest != NO_PUT
        try:
            cp._transport.synchronize()
            said = ""
        except ExchangeError as error:
            said = str(error)
    del handle
    return cp._transport.fabric.oldest_put, said  # type: ignore[attr-defined]


def test_synchronize_of_shared_memory_waits_for_puts_and_raises_what_went_wrong() -> None:
    whole, broken = run_cases(puts_under_way, 2, [(False,), (True,)])
    assert whole == [(NO_PUT, "")] * 2
    assert [said for _, said in broken] == [f"rank {rank} could not put its rows: no such memory" for rank in range(2)]


def test_one_rank_alone_has_nothing_to_wait_for() -> None:
    Alone().synchronize()
