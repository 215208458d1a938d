"""Counted on the wire: rows and bytes that leave each rank equal the route's, for every strategy and exchange; with
head ranks on both levels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import flashcp
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.comm.fabrics.base import Put
from flashcp.comm.fabrics.shm import ShmFabric
from flashcp.comm.two_sided import ALL_GATHER
from flashcp.sharding.holders import bytes_inside, members_heads
from tests.packs import random_lengths, random_qkv
from tests.ranks import run_cases

HEADS, HEAD_DIM = 12, 8


class Wire:
    """What leaves this rank for another, seen where it leaves."""

    sent_bytes = 0


@contextmanager
def watched() -> Iterator[Wire]:
    """Watches torch.distributed's operations (those that carry rows) and stores into others' memory."""
    wire = Wire()
    all_to_all, all_gather, batch, copy = (
        dist.all_to_all_single,
        getattr(dist, ALL_GATHER),
        dist.batch_isend_irecv,
        ShmFabric._copy,
    )

    def counted_all_to_all(into: Tensor, rows: Tensor, received: list[int], sent: list[int], **rest: Any) -> Any:
        rank = dist.get_rank(rest["group"])
        wire.sent_bytes += sum(part.nbytes for to, part in enumerate(rows.split(sent)) if to != rank)
        return all_to_all(into, rows, received, sent, **rest)

    def counted_all_gather(into: Tensor, block: Tensor, **rest: Any) -> Any:
        wire.sent_bytes += block.nbytes * (dist.get_world_size(rest["group"]) - 1)
        return all_gather(into, block, **rest)

    def counted_batch(operations: list[dist.P2POp]) -> Any:
        wire.sent_bytes += sum(each.tensor.nbytes for each in operations if each.op is dist.isend)
        return batch(operations)

    def counted_copy(fabric: ShmFabric, put: Put, into: Tensor) -> None:
        wire.sent_bytes += into.nbytes * (put.to != fabric.rank)
        copy(fabric, put, into)

    with (
        patch.object(dist, "all_to_all_single", counted_all_to_all),
        patch.object(dist, ALL_GATHER, counted_all_gather),
        patch.object(dist, "batch_isend_irecv", counted_batch),
        patch.object(ShmFabric, "_copy", counted_copy),
    ):
        yield wire


def bytes_on_rank(
    lengths: tuple[int, ...],
    strategy: str,
    exchange: str,
    kv_heads: int,
    dtype: torch.dtype,
    gradient_wire: str,
    transport: str,
) -> tuple[int, int]:
    cp = flashcp.ContextParallel(exchange=exchange, transport=transport, gradient_wire=gradient_wire, timeout_s=20)
    plan = flashcp.plan(lengths, cp.world_size, strategy)
    *qkv, grad = random_qkv(sum(lengths), HEADS, kv_heads, HEAD_DIM, dtype, seed=0)
    q, k, v = (cp.shard(x, plan).requires_grad_() for x in qkv)
    with watched() as wire:
        out = cp.attention(q, k, v, plan)
        forward = wire.sent_bytes
        out.backward(cp.shard(grad, plan))
    assert cp.sent_bytes == wire.sent_bytes
    return forward, wire.sent_bytes - forward


@pytest.mark.parametrize("transport", ["gloo", "shm"])
def test_bytes_on_the_wire_are_the_routes(transport: str) -> None:
    world_size = 3
    cases = [
        (random_lengths(i), strategy, exchange, kv_heads, dtype, gradient_wire, transport)
        for i, strategy in enumerate(flashcp.strategies())
        for exchange in EXCHANGE_CLASSES
        for kv_heads, dtype, gradient_wire in (  # one KV head: `ulysses` sends it to all
            (6, torch.float32, "model"),
            (6, torch.bfloat16, "fp32"),
            (1, torch.bfloat16, ("model", "fp32", "auto")[i % 3]),
        )
    ]
    for case, ranks in zip(cases, run_cases(bytes_on_rank, world_size, cases), strict=True):
        lengths, strategy, exchange, kv_heads, dtype, gradient_wire, _ = case
        route = flashcp.plan(lengths, world_size, strategy).route(exchange)
        forward = route.bytes(HEADS, kv_heads, HEAD_DIM, dtype.itemsize)
        backward = route.bytes(HEADS, kv_heads, HEAD_DIM, dtype.itemsize, True, gradient_wire)
        assert ranks == list(zip(forward.tolist(), backward.tolist(), strict=True)), case


def bytes_on_levels(
    head_ranks: int, lengths: tuple[int, ...], strategy: str, exchange: str, kv_heads: int, dtype: torch.dtype,
    gradient_wire: str, transport: str,
) -> list[tuple[int, int]]:  # fmt: skip
    """Bytes that left inside the holder and between holders, forward and backward."""
    cp = flashcp.ContextParallel(
        exchange=exchange, transport=transport, head_ranks=head_ranks, gradient_wire=gradient_wire, timeout_s=20
    )
    inside, between = cp._connection.inside, cp._transport
    assert inside is not None
    plan = flashcp.plan(lengths, cp.holders, strategy)
    *qkv, grad = random_qkv(sum(lengths), HEADS, kv_heads, HEAD_DIM, dtype, seed=0)
    q, k, v = (cp.shard(x, plan).requires_grad_() for x in qkv)
    with watched() as wire:
        out = cp.attention(q, k, v, plan)
        forward = (inside.sent_bytes, between.sent_bytes)
        out.backward(cp.shard(grad, plan))
    assert cp.sent_bytes == wire.sent_bytes == inside.sent_bytes + between.sent_bytes
    return [forward, (inside.sent_bytes - forward[0], between.sent_bytes - forward[1])]


@pytest.mark.parametrize(("holders", "head_ranks"), [(2, 2), (1, 4), (3, 2)])
def test_bytes_on_both_wires_are_those_of_holders_and_routes(holders: int, head_ranks: int) -> None:
    cases = [
        (head_ranks, random_lengths(i, 12), strategy, exchange, kv_heads, dtype, wire, ("shm", "gloo")[(i + j) % 2])
        for i, strategy in enumerate(flashcp.strategies())
        for j, exchange in enumerate(EXCHANGE_CLASSES)
        for kv_heads, dtype, wire in (
            (12, (torch.float32, torch.bfloat16)[(i + j) % 2], ("fp32", "model")[i % 2]),
            (1, torch.bfloat16, ("model", "fp32", "auto")[(i + j) % 3]),
        )
    ]
    for case, ranks in zip(cases, run_cases(bytes_on_levels, holders * head_ranks, cases), strict=True):
        _, lengths, strategy, exchange, kv_heads, dtype, wire, _ = case
        plan = flashcp.plan(lengths, holders, strategy)
        heads = (*members_heads(HEADS, kv_heads, head_ranks), HEAD_DIM, dtype.itemsize)
        whole = HEADS, kv_heads, HEAD_DIM, dtype.itemsize
        inside = [bytes_inside(plan, head_ranks, *whole, back, wire) for back in (False, True)]
        between = [plan.route(exchange).bytes(*heads, back, wire) for back in (False, True)]
        for rank, found in enumerate(ranks):
            wanted = [
                (int(one[rank]), int(other[rank // head_ranks])) for one, other in zip(inside, between, strict=True)
            ]
            assert found == wanted, (case, rank)
