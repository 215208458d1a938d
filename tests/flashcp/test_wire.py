"""What gradients travel in: errors against float64, repeatability, and when they leave."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import flashcp
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.comm.one_sided import OneSided
from flashcp.comm.two_sided import TwoSided
from flashcp.kernels import cpu
from flashcp.sharding.holders import can_share_heads, members_heads
from flashcp.sharding.route import GRADIENT_WIRES
from tests.like_nccl import like_nccl
from tests.packs import random_qkv, relative_error
from tests.ranks import run_cases

LENGTHS = (50, 7, 1, 70)
SHAPES = ((2, 1), (3, 1), (1, 2), (2, 2), (1, 4))
"""Holders and head ranks."""


def errors(exchange: str, head_ranks: int, kv_heads: int, dtype: torch.dtype) -> dict[str, tuple[list[float], bool]]:
    """By wire: relative errors of this rank's gradients of K and V, and whether two runs are the same bit for bit."""
    q, k, v, grad = random_qkv(sum(LENGTHS), 12, kv_heads, 8, dtype, seed=0)
    a, b, c = (x.double().requires_grad_() for x in (q, k, v))
    exact = torch.autograd.grad(flashcp.reference_attention(a, b, c, LENGTHS), (b, c), grad.double())
    found = {}
    for wire in GRADIENT_WIRES:
        cp = flashcp.ContextParallel(exchange=exchange, head_ranks=head_ranks, gradient_wire=wire, timeout_s=20)
        plan = flashcp.plan(LENGTHS, cp.holders, "per_document")
        local = [cp.shard(x, plan).requires_grad_() for x in (q, k, v)]
        first, again = (torch.autograd.grad(cp.attention(*local, plan), local, cp.shard(grad, plan)) for _ in range(2))
        of_kv = [cp.unshard(x, plan) for x in first[1:]]
        assert all(x.dtype == dtype for x in first)
        found[wire] = [*map(relative_error, of_kv, exact)], all(map(torch.equal, first, again))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_auto_costs_less_than_half_of_the_last_rounding_and_runs_repeat(dtype: torch.dtype) -> None:
    shared = (12, 4, 2, 1) if dtype == torch.bfloat16 else (12, 1)  # the others go the same ways
    for holders, head_ranks in SHAPES:
        cases = [(exchange, head_ranks, kv, dtype) for exchange in EXCHANGE_CLASSES for kv in shared]
        cases = [case for case in cases if _fits(case[0], holders, head_ranks, case[2])]
        for case, ranks in zip(cases, run_cases(errors, holders * head_ranks, cases), strict=True):
            for found in ranks:
                assert all(same for _, same in found.values()), case
                auto, model, fp32 = (torch.tensor(found[wire][0]) for wire in ("auto", "model", "fp32"))
                assert (auto < 1.5 * fp32).all(), (case, found)
                if dtype == torch.float32 or not _is_rounded(case[0], holders, head_ranks, case[2]):
                    assert auto.tolist() == model.tolist() == fp32.tolist(), case
                else:
                    assert (model > fp32).all(), case
                    assert (auto == fp32).all() == (case[0] == "ring" or holders == 1), case


def _fits(exchange: str, holders: int, head_ranks: int, kv_heads: int) -> bool:
    if not can_share_heads(12, kv_heads, head_ranks):
        return False
    return exchange != "ulysses" or all(heads % holders == 0 for heads in members_heads(12, kv_heads, head_ranks))


def _is_rounded(exchange: str, holders: int, head_ranks: int, kv_heads: int) -> bool:
    """Whether any gradient is rounded on its way before it is added to others."""
    return (holders > 1 and exchange != "ulysses") or head_ranks > kv_heads


def order_of(exchange: str, transport: str) -> list[str]:
    """What a rank does in a backward pass: `tiles` of a source are computed, gradients `leave`."""
    said: list[str] = []
    compute, leaving = cpu.gradients_on_cpu, OneSided.leaving
    batch, together = TwoSided.batch, TwoSided.all_to_all

    def computed(*x: Any) -> Any:
        if said[-1:] != ["tiles"]:
            said.append("tiles")
        return compute(*x)

    def left(self: Any, outgoing: Any, *rest: Any, **more: Any) -> Any:
        if outgoing.what == "gradients":
            said.append("leave")
        return leaving(self, outgoing, *rest, **more)

    def sent(self: Any, operations: Any, *rest: Any) -> Any:
        said.extend("leave" for operation, rows, _ in operations if operation is dist.isend and len(rows))
        return batch(self, operations, *rest)

    def sent_together(self: Any, outgoing: Any, *rest: Any) -> Any:
        if outgoing.what == "gradients":
            said.append("leave")
        return together(self, outgoing, *rest)

    with like_nccl("nccl" if transport == "nccl" else "gloo"):
        cp = flashcp.ContextParallel(exchange=exchange, transport=transport, timeout_s=20)
        plan = flashcp.plan([128], cp.world_size, "per_document")
        q, k, v, grad = (cp.shard(x, plan) for x in random_qkv(128, 3, 3, 8, torch.float32, seed=0))
        local = [x.requires_grad_() for x in (q, k, v)]
        out = cp.attention(*local, plan)
        with (
            patch.object(cpu, "gradients_on_cpu", computed),
            patch.object(OneSided, "leaving", left),
            patch.object(TwoSided, "batch", sent),
            patch.object(TwoSided, "all_to_all", sent_together),
        ):
            torch.autograd.grad(out, local, grad)
    return said


def test_gradients_leave_source_by_source() -> None:
    """Over NCCL they leave together; of a ring the first hop leaves early, and the second when all was computed."""
    cases = [
        (exchange, transport) for exchange in ("exact", "compacted", "all_gather") for transport in ("shm", "gloo")
    ]
    for said in run_cases(order_of, 3, cases):
        assert said == [["tiles", "leave", "tiles", "leave", "tiles"]] * 3
    cases = [("ring", "shm"), ("ring", "gloo"), ("exact", "nccl")]
    *rings, nccl = run_cases(order_of, 3, cases)
    assert rings == [[["tiles", "leave", "tiles", "leave"]] * 3] * 2
    assert nccl == [["tiles", "leave", "tiles"]] * 3
