"""With head ranks, too, a rank that disagrees, fails or stays away is named on every rank: 2 holders of 2 ranks."""

from __future__ import annotations

import time
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import flashcp
from flashcp.comm.errors import ExchangeError, ExchangeTimeoutError, PeerFailedError, PlanMismatchError
from flashcp.comm.fabrics.base import Put
from flashcp.comm.fabrics.shm import ShmFabric
from flashcp.comm.mail import Mail
from flashcp.comm.one_sided import OneSided
from tests.flashcp.test_agreement import TODAY, YESTERDAY, attention, message
from tests.ranks import run_cases, run_ranks

ODD = (1, 2)
"""The ranks that misbehave: rank 1 shares a holder with rank 0, and its place in it with rank 3."""
CASES = [(1, "shm"), (2, "gloo"), (2, "shm+gloo"), (1, "gloo+shm")]


def operator(transport: str, timeout_s: float = 20) -> flashcp.ContextParallel:
    return flashcp.ContextParallel(transport=transport, head_ranks=2, timeout_s=timeout_s)


def old_plan(odd: int, transport: str) -> tuple[str, float]:
    cp = operator(transport)
    old, new = (flashcp.plan(lengths, 2, "per_document") for lengths in (YESTERDAY, TODAY))
    attention(cp, old)  # everybody agreed once: the check must not be remembered
    started = time.monotonic()
    said = message(PlanMismatchError, attention, cp, old if cp.rank == odd else new)
    took = time.monotonic() - started
    if cp.transport != "gloo+gloo":
        assert "earlier error, make a new ContextParallel" in message(ExchangeError, attention, cp, new)
        cp = operator(transport)
    attention(cp, new, grad=True).sum().backward()  # the groups are as good as before
    return said, took


def test_a_rank_with_an_old_plan_stops_all_ranks_by_name() -> None:
    old, new = (flashcp.plan(lengths, 2, "per_document").fingerprint for lengths in (YESTERDAY, TODAY))
    for (odd, _), ranks in zip(CASES, run_cases(old_plan, 4, CASES), strict=True):
        others = ", ".join(str(rank) for rank in range(4) if rank != odd)
        for said, took in ranks:
            assert f"rank {odd} {old}; ranks {others} {new}" in said
            assert took < 5


def bad_arguments(odd: int, transport: str) -> tuple[str, float]:
    cp = operator(transport, timeout_s=30)
    plan = flashcp.plan(TODAY, 2, "per_document")
    x = torch.zeros(len(cp.position_ids(plan)), 2, 8)
    for _ in range(4):
        attention(cp, plan)  # receive buffers are there: no rank stops to make some, and hears of the error so
    started = time.monotonic()
    if cp.rank == odd:
        said = message(ValueError, cp.attention, x[:-1], x, x, plan)
    else:
        said = message(PeerFailedError, cp.attention, x, x, x, plan)
    took = time.monotonic() - started
    attention(operator(transport), plan)
    return said, took


def test_an_error_on_one_rank_reaches_all_at_once_and_leaves_the_groups_usable() -> None:
    for (odd, _), ranks in zip(CASES, run_cases(bad_arguments, 4, CASES), strict=True):
        for rank, (said, took) in enumerate(ranks):
            assert ("equal tokens" if rank == odd else f"rank {odd} stopped with an error before the exchange") in said
            assert took < 10


def absent(odd: int, transport: str, backward: bool) -> tuple[str, float]:
    """What is said where one rank comes much too late, in the forward or in the backward."""
    cp = operator(transport, timeout_s=0.7)
    plan = flashcp.plan(TODAY, 2, "per_document")
    attention(cp, plan)
    out = attention(cp, plan, grad=True) if backward else torch.empty(0)
    dist.barrier()
    started = time.monotonic()
    if cp.rank == odd:
        time.sleep(3.5)
        return "", 0.0
    said = (
        message(ExchangeTimeoutError, out.sum().backward)
        if backward
        else message(ExchangeTimeoutError, attention, cp, plan)
    )
    return said, time.monotonic() - started


@pytest.mark.parametrize(
    ("odd", "transport", "backward"),
    [(1, "shm", False), (2, "gloo", False), (3, "gloo+shm", False), (2, "shm", True), (0, "shm+gloo", True)],
)
def test_a_rank_that_does_not_come_is_named_on_all(odd: int, transport: str, backward: bool) -> None:
    for rank, (said, took) in enumerate(run_ranks(absent, 4, odd, transport, backward)):
        assert rank == odd or f"rank {odd} did not come to the exchange (call 2)" in said
        assert took < 3.5  # twice the time-out, and a hop


def rows_that_never_leave(odd: int, inside: bool) -> list[str]:
    """What two calls raise where one rank's rows never leave, inside its holder or between holders."""
    cp = operator("shm", timeout_s=1)
    plan = flashcp.plan(TODAY, 2, "per_document")
    attention(cp, plan)
    level = cp._connection.inside if inside else cp._transport
    assert isinstance(level, OneSided)

    def is_free(fabric: ShmFabric, put: Put) -> bool:
        return free(fabric, put) and not (fabric is level.fabric and cp.rank == odd)

    free, said = ShmFabric._is_free, []
    with patch.object(ShmFabric, "_is_free", is_free):
        for _ in range(2):
            said.append(message(ExchangeError, attention, cp, plan))
            time.sleep(0.5)
    return said


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("inside", [True, False])
def test_rows_that_never_leave_are_named_by_their_rank_among_all(odd: int, inside: bool) -> None:
    reader = odd ^ 1 if inside else (odd + 2) % 4
    ranks = run_ranks(rows_that_never_leave, 4, odd, inside)
    assert f"rank {reader} waited 1 s for the rows of rank {odd} (epoch" in ranks[reader][0]
    for said in ranks:
        assert any(text != "nothing was raised" for text in said), ranks


def letters(head_ranks: int) -> int:
    """Headers that this rank sends for a forward and a backward."""
    cp = flashcp.ContextParallel(head_ranks=head_ranks, timeout_s=20)
    plan = flashcp.plan(TODAY, cp.holders, "per_document")
    send, sent = Mail.send, 0

    def counted(mail: Mail, words: torch.Tensor, rank: int, tag: int) -> object:
        nonlocal sent
        sent += words.dtype == torch.int64  # others set up memory
        return send(mail, words, rank, tag)

    with patch.object(Mail, "send", counted):
        q, k, v = (cp.shard(torch.ones(64, 6, 8), plan).requires_grad_() for _ in range(3))
        cp.attention(q, k, v, plan).sum().backward()
    return sent


def test_a_rank_writes_to_its_holder_and_to_one_rank_of_each_other() -> None:
    for head_ranks, expected in ((1, 5), (2, 1 + 2), (3, 2 + 1), (6, 5)):
        assert run_ranks(letters, 6, head_ranks) == [2 * expected] * 6
