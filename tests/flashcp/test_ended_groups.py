"""After an error: where the process group still works a new operator goes on, else all are told what helps."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial

import pytest
import torch.distributed as dist

import flashcp
from flashcp.comm.errors import ExchangeError
from tests.faults import Fault, Mishap, faulty
from tests.flashcp.test_agreement import TODAY, attention, message
from tests.ranks import run_ranks


def after_a_time_out(transport: str, head_ranks: int) -> tuple[list[str], int]:
    """Rank 1 comes too late. What is said then, and how many rows there are over another group."""
    plan = flashcp.plan(TODAY, dist.get_world_size() // head_ranks, "per_document")
    operator = partial(flashcp.ContextParallel, transport=transport, head_ranks=head_ranks)
    cp = operator(timeout_s=1.0)
    attention(cp, plan)
    if cp.rank == 1:
        time.sleep(5.0)  # the other holder waits twice the time-out, and a second
    said = [message(ExchangeError, attention, cp, plan) for _ in range(2)]
    if head_ranks == 1:
        said += [message(ExchangeError, operator)]
    another = operator(dist.new_group(range(dist.get_world_size())), timeout_s=20.0)
    return said, len(attention(another, plan, grad=True))


@pytest.mark.parametrize(("ranks", "head_ranks"), [(2, 1), (4, 2)])
@pytest.mark.parametrize("transport", ["gloo", "shm"])
def test_what_helps_after_a_time_out_is_said_and_helps(transport: str, ranks: int, head_ranks: int) -> None:
    """Headers go over gloo under every transport."""
    for (first, *later), rows in run_ranks(after_a_time_out, ranks, transport, head_ranks, lost=[]):
        assert first.startswith("rank")
        for said in later:
            assert "make a new process group, or start the run again" in said
            assert "\n" not in said
            assert "pair" not in said  # gloo's own words
        assert rows > 0


def after_a_mishap() -> tuple[str, int]:
    """Rank 1 fails between its header and its rows."""
    with faulty(Fault("raise")):
        cp = flashcp.ContextParallel(transport="shm", timeout_s=3)
    plan = flashcp.plan(TODAY, 3, "per_document")
    with suppress(ExchangeError, Mishap):
        for _ in range(3):
            attention(cp, plan)
    # Rank 1 would wait for headers as long as the others for its rows: who gives up first would end the group or not.
    said = message(ExchangeError, attention, cp, plan) if cp.rank != 1 else ""
    dist.barrier()
    return said, len(attention(flashcp.ContextParallel(transport="shm", timeout_s=20), plan))


def test_a_new_operator_helps_where_the_group_still_works() -> None:
    """What the one that failed left on its way is not read."""
    answers = run_ranks(after_a_mishap, 3)
    assert all(rows for _, rows in answers)
    assert "earlier error, make a new ContextParallel: rank 0 waited 3 s for the rows of rank 1" in answers[0][0]
