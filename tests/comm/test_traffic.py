"""Counted on the wire: rows and bytes that leave each rank equal the route's, for every strategy and exchange."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import flashcp
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.comm.transport import Arrival, TwoSided
from tests.packs import random_lengths, random_qkv
from tests.ranks import run_cases

HEADS, KV_HEADS, HEAD_DIM = 12, 6, 8


class Counting(TwoSided):
    """The real transport, and the bytes that leave this rank for another."""

    sent_bytes = 0

    def all_to_all(self, rows: Tensor, sent: Sequence[int], into: Tensor, received: Sequence[int]) -> Arrival:
        self.sent_bytes += (sum(sent) - sent[self.rank]) * (rows[:1].nbytes if len(rows) else 0)
        return super().all_to_all(rows, sent, into, received)

    def all_gather(self, block: Tensor, into: Tensor) -> Arrival:
        self.sent_bytes += block.nbytes * (self.world_size - 1)
        return super().all_gather(block, into)

    def shift(self, rows: Tensor, into: Tensor) -> Arrival:
        self.sent_bytes += rows.nbytes
        return super().shift(rows, into)


def bytes_on_rank(lengths: tuple[int, ...], strategy: str, exchange: str, dtype: torch.dtype) -> tuple[int, int]:
    cp = flashcp.ContextParallel(exchange=exchange, timeout_s=20)
    wire = Counting(None, 20)
    cp._exchange.transport = wire
    plan = flashcp.plan(lengths, cp.world_size, strategy)
    *qkv, grad = random_qkv(sum(lengths), HEADS, KV_HEADS, HEAD_DIM, dtype, seed=0)
    q, k, v = (cp.shard(x, plan).requires_grad_() for x in qkv)
    out = cp.attention(q, k, v, plan)
    forward = wire.sent_bytes
    out.backward(cp.shard(grad, plan))
    return forward, wire.sent_bytes - forward


def test_bytes_on_the_wire_are_the_routes() -> None:
    world_size = 3
    cases = [
        (random_lengths(i), strategy, exchange, dtype)
        for i, strategy in enumerate(flashcp.strategies())
        for exchange in EXCHANGE_CLASSES
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for case, ranks in zip(cases, run_cases(bytes_on_rank, world_size, cases), strict=True):
        lengths, strategy, exchange, dtype = case
        route = flashcp.plan(lengths, world_size, strategy).route(exchange)
        wire = EXCHANGE_CLASSES[exchange].gradient_dtype or dtype
        forward = route.bytes(HEADS, KV_HEADS, HEAD_DIM, dtype.itemsize)
        backward = route.bytes(HEADS, KV_HEADS, HEAD_DIM, wire.itemsize, backward=True)
        assert ranks == list(zip(forward.tolist(), backward.tolist(), strict=True)), case
