"""A table of faults: whatever happens to a message or a rank, all others end within a bound, and say what happened."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
import torch.distributed as dist

import flashcp
from flashcp.comm.errors import ExchangeError
from tests.faults import Fault, Mishap, faulty, strike
from tests.packs import random_qkv, relative_error

LENGTHS = (50, 7, 39)
HEADS = (12, 12)
TIMEOUT_S = 2.0


class Cell(NamedTuple):
    exchange: str
    transport: str
    fault: Fault | None
    verify_rows: bool = False
    ranks: int = 3
    head_ranks: int = 1


class Answer(NamedTuple):
    """What a rank said, in how many seconds; and how far its numbers were off, where it said nothing."""

    kind: str
    said: str
    took: float
    error: float


def answer(cell: Cell) -> Answer:
    """Two layers at once, forward and backward, behind a call that all goes well in."""
    fault = cell.fault
    with faulty(fault):
        cp = flashcp.ContextParallel(
            exchange=cell.exchange, transport=cell.transport, head_ranks=cell.head_ranks, timeout_s=TIMEOUT_S,
            verify_rows=cell.verify_rows,
        )  # fmt: skip
    plan = flashcp.plan(LENGTHS, cp.holders, "per_document")
    q, k, v, grad = random_qkv(sum(LENGTHS), *HEADS, 8, torch.float32, seed=1)
    local = [cp.shard(x, plan).requires_grad_() for x in (q, k, v)]
    whole = [x.double().requires_grad_() for x in (q, k, v)]
    full = sum(flashcp.reference_attention(whole[0], times * whole[1], whole[2], LENGTHS) for times in (1, 2))
    expected = [cp.shard(x, plan) for x in (full, *torch.autograd.grad(full, whole, grad.double()))]
    kind, said, found = "", "", list[torch.Tensor]()
    dist.barrier()
    started = time.monotonic()
    try:
        with cp:
            cp.attention(*(x.detach() for x in local), plan)
            if fault is not None and fault.what == "header" and cp.rank == fault.rank:
                strike(fault.kind)
            one, other = cp.prefetch(*local[1:], plan), cp.prefetch(2 * local[1], local[2], plan)
            out = one.attention(local[0]) + other.attention(local[0])
            found = [out, *torch.autograd.grad(out, local, cp.shard(grad, plan))]
            cp.synchronize()
    except (ExchangeError, Mishap) as raised:
        kind, said = type(raised).__name__, str(raised)
    took = time.monotonic() - started
    error = max(map(relative_error, found, expected), default=0.0)
    return Answer(kind, said, took, error)
