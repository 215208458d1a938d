"""How an operator ends: close, a block that is left, and a script that just ends."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import flashcp
from flashcp.comm.errors import ExchangeError
from flashcp.comm.fabrics.shm import PUTS
from flashcp.sharding.plan import ShardingPlan
from tests.checkout import ROOT
from tests.ranks import run_cases, run_ranks

CLOSED = "this ContextParallel was closed: make another one"


def call(cp: flashcp.ContextParallel, plan: ShardingPlan) -> Tensor:
    q, k, v = (torch.randn(int(cp.position_ids(plan).numel()), 4, 8, requires_grad=True) for _ in range(3))
    return cp.attention(q, k, v, plan)


def putting(before: set[threading.Thread]) -> int:
    """Threads that put rows, without those of operators that other tests left to be collected."""
    return sum(thread.name == PUTS for thread in {*threading.enumerate()} - before)


def closes(transport: str, head_ranks: int) -> str:
    plan, before = flashcp.plan((20, 7), dist.get_world_size() // head_ranks), {*threading.enumerate()}
    with flashcp.ContextParallel(transport=transport, head_ranks=head_ranks, timeout_s=20) as cp:
        call(cp, plan).sum().backward()
        kept = call(cp, plan)
        x, model = torch.zeros(len(cp.position_ids(plan)), 4, 8), torch.nn.Linear(1, 1)
        cp.prefetch(x, x, plan)  # thrown away: its rows still travel
        assert putting(before) == (transport == "shm") * (1 + (1 < head_ranks < dist.get_world_size()))
    assert not putting(before)
    cp.close()
    calls: list[Callable[[], object]] = [
        lambda: kept.sum().backward(),
        lambda: cp.attention(x, x, x, plan),
        lambda: cp.prefetch(x, x, plan),
        lambda: cp.gather(x, plan),
        lambda: cp.reshard(x, plan, plan),
        lambda: cp.attend(x, x, x, x, x, plan),
        lambda: cp.unshard(x, plan),
        lambda: cp.shard(x, plan),
        lambda: cp.position_ids(plan),
        lambda: cp.sum_gradients(model),
        cp.synchronize,
        cp.__enter__,
    ]
    for each in calls:
        with pytest.raises(RuntimeError, match=CLOSED):
            each()
    with flashcp.ContextParallel(timeout_s=20) as another:  # the group is as good as before
        call(another, flashcp.plan((20, 7), another.world_size))
    return repr(cp)


def test_a_closed_operator_leaves_no_thread_and_refuses_calls() -> None:
    cases = [*itertools.product(("shm", "gloo"), (1, 2, 4))]
    for (transport, head_ranks), said in zip(cases, run_cases(closes, 4, cases), strict=True):
        both = f"{transport}+{transport}" if head_ranks == 2 else transport
        assert said == [
            f"ContextParallel(rank {rank} of 4, head_ranks={head_ranks}, exchange=exact, transport={both}, "
            "overlap=staged, attention=auto, closed)"
            for rank in range(4)
        ]


def leaves_by_an_error(transport: str) -> None:
    plan, before = flashcp.plan((20, 7), 2), {*threading.enumerate()}

    def block() -> None:
        with flashcp.ContextParallel(transport=transport, timeout_s=5) as cp:
            if cp.rank == 0:
                raise KeyError
            call(cp, plan)

    with pytest.raises((KeyError, ExchangeError)):
        block()
    assert not putting(before)


def test_a_block_that_is_left_by_an_error_waits_for_nobody() -> None:
    for transport in ("shm", "gloo"):
        run_ranks(leaves_by_an_error, 2, transport, timeout_s=20)


def test_one_rank_alone() -> None:
    cp = flashcp.ContextParallel(head_ranks=1)
    assert repr(cp) == (
        "ContextParallel(rank 0 of 1, head_ranks=1, exchange=exact, transport=none, overlap=staged, attention=auto)"
    )
    assert cp.position_ids(flashcp.plan([3], 1), device="meta").device.type == "meta"
    cp.close()
    with pytest.raises(RuntimeError, match=CLOSED):
        call(cp, flashcp.plan([3], 1))


SCRIPT = """
import sys, torch, torch.distributed as dist, flashcp
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
cp = flashcp.ContextParallel(transport=sys.argv[3])
plan = flashcp.plan([65536], 2, "contiguous")
x = torch.zeros(32768, 1, 1024)
rows = cp.prefetch(x, x, plan)
if sys.argv[3] == "gloo":
    dist.barrier()  # who ends sooner closes the sockets that the other's header goes over
"""


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_a_script_may_end_while_rows_leave(transport: str, tmp_path: Path) -> None:
    """Rank 0 puts or sends 256 MiB: a thread is inside of torch when the script is over."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "store")]
    ranks = [
        subprocess.Popen([*command, str(rank), transport], env=environment, stderr=subprocess.PIPE) for rank in range(2)
    ]
    said = [rank.communicate()[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
