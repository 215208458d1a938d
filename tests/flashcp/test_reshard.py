"""reshard: rows from one plan's ranks to another's, there and, as gradients, back; only what changes its rank moves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import flashcp
from flashcp.sharding.reshard import Move
from tests.packs import random_lengths
from tests.ranks import run_cases

PAIRS = [("flashcp", "contiguous"), ("per_document", "per_sequence"), ("flashcp_paper", "flashcp"), ("contiguous",) * 2]


def plans(lengths: tuple[int, ...], names: tuple[str, str], ranks: int, in_order: bool) -> list[flashcp.ShardingPlan]:
    """in_order: the second plan sees one document, whose parts lie on the ranks in the order of the pack."""
    seen = (lengths, (sum(lengths),) if in_order else lengths)
    return [flashcp.plan(each, ranks, name) for each, name in zip(seen, names, strict=True)]


def moved(lengths: tuple[int, ...], names: tuple[str, str], in_order: bool, transport: str) -> list[bool]:
    cp = flashcp.ContextParallel(transport=transport, timeout_s=20)
    before, after = plans(lengths, names, cp.world_size, in_order)
    full = torch.randn(sum(lengths), 3, 5, generator=torch.Generator().manual_seed(1))
    x = cp.shard(full, before).requires_grad_()
    handle = cp.prefetch_reshard(x, before, after)
    there = handle.rows()
    away = torch.from_numpy(Move(before, after).rows)
    leaving = int(away[cp.rank].sum() - away[cp.rank, cp.rank])
    sent = cp.sent_bytes == leaving * 15 * 4
    weight = torch.randn(full.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad(there, x, cp.shard(weight, after))
    with pytest.raises(RuntimeError, match="reshard again"):
        handle.rows()
    back = cp.reshard(cp.reshard(full.to(torch.bfloat16)[torch.from_numpy(before.rows(cp.rank))], before, after), after,
                      before)  # fmt: skip
    return [
        sent,
        torch.equal(there, cp.shard(full, after)),
        torch.equal(gradient, cp.shard(weight, before)),
        torch.equal(back, cp.shard(full.to(torch.bfloat16), before)),
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_rows_go_there_and_gradients_back(world_size: int) -> None:
    cases = [
        (random_lengths(i + 5 * world_size), names, i % 3 == 0, ("gloo", "shm")[i % 2] if world_size > 1 else "auto")
        for i, names in enumerate(PAIRS * 2)
    ]
    for case, ranks in zip(cases, run_cases(moved, world_size, cases), strict=True):
        assert all(map(all, ranks)), (case, ranks)


@pytest.mark.parametrize("seed", range(10))
def test_moves_are_those_of_single_rows(seed: int) -> None:
    lengths, ranks = random_lengths(seed), 2 + seed % 4
    before, after = plans(lengths, PAIRS[seed % 4], ranks, seed % 2 == 1)
    move = Move(before, after)
    owners = []
    for plan in (before, after):
        owner = np.empty(sum(lengths), dtype=int)
        for rank in range(ranks):
            owner[plan.rows(rank)] = rank
        owners.append(owner)
    counted = np.zeros((ranks, ranks), dtype=int)
    np.add.at(counted, tuple(owners), 1)
    assert (move.rows == counted).all()
    for rank in range(ranks):
        leaving, arriving = before.rows(rank)[move.leaving(rank)], after.rows(rank)[move.arriving(rank)]
        assert (np.diff(owners[1][leaving]) >= 0).all()
        assert (np.diff(owners[0][arriving]) >= 0).all()
        for other in range(ranks):
            there = after.rows(other)[move.arriving(other)]
            assert (leaving[owners[1][leaving] == other] == there[owners[0][there] == rank]).all()


def test_a_plan_moves_nothing_to_itself() -> None:
    plan = flashcp.plan((50, 30, 20), 4)
    rows = Move(plan, plan).rows
    assert rows.tolist() == np.diag(plan.tokens).tolist()
