"""One rank of a plan as the attention kernels meet it, without the exchange: what it holds and what others sent it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcp.kernels.interface import KV, AttentionKernel
from flashcp.kernels.schedule import build_schedule
from flashcp.sharding.plan import Segments, ShardingPlan


def pack_rows(plan: ShardingPlan, segments: Segments) -> np.ndarray:
    """Rows of the pack that a list of segments holds, in order."""
    starts = plan.offsets[segments.document] + segments.start
    lengths = segments.stop - segments.start
    return np.concatenate([np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)] or [np.zeros(0, int)])


def surrounded(x: Tensor, columns: int) -> Tensor:
    """The same numbers with columns of NaN behind each row, so that every tensor has strides of its own."""
    return torch.cat((x, x.new_full((*x.shape[:-1], columns), torch.nan)), dim=-1)[..., : x.shape[-1]]


class Rank:
    """A rank's tensors as an exchange would lay them out; rows of the receive buffer that no one sends stay NaN."""

    def __init__(self, plan: ShardingPlan, exchange: str, rank: int, qkv: list[Tensor], grad: Tensor) -> None:
        route = plan.route("ring" if exchange == "sources" else exchange)
        self.received = route.received(rank)
        if exchange == "ulysses":  # every row of the pack in order of arrival, all of them local
            self.queries = self.received
            self.received = self.received.take(np.zeros(0, int))
        else:
            self.queries = plan.local(rank)
        self.rows = torch.from_numpy(pack_rows(plan, self.queries))
        self.sent = torch.from_numpy(pack_rows(plan, self.received))
        self.slots = torch.from_numpy(self.received.buffer_rows())
        self.q, k, v, self.grad = (surrounded(x[self.rows], i + 1) for i, x in enumerate((*qkv, grad)))
        self.local = KV(k, v)
        size = int(self.slots.max()) + 1 if len(self.slots) else 0
        dims = k.shape[2], v.shape[2]
        self.buffer = torch.full((size, 2, k.shape[1], max(dims)), torch.nan, dtype=k.dtype)
        for half, (x, dim) in enumerate(zip(qkv[1:], dims, strict=True)):
            self.buffer[self.slots, half, :, :dim] = x[self.sent]
        k, v = (self.buffer[:, half, :, :dim] for half, dim in enumerate(dims))
        self.from_others = KV(surrounded(k, 2), surrounded(v, 3))
        parts = [self.received]
        if exchange == "sources":  # as a ring computes: block after block
            parts = [self.received.take(self.received.rank == rank) for rank in np.unique(self.received.rank)]
        self.parts = [build_schedule(self.queries, received=part, masks=plan.masks) for part in parts]
        self.parts.insert(0, build_schedule(self.queries, local=self.queries, masks=plan.masks))
        self.whole = build_schedule(self.queries, local=self.queries, received=self.received, masks=plan.masks)

    def one_launch(self, kernel: AttentionKernel, scale: float, **options: Any) -> tuple[Tensor, Tensor, KV, Tensor]:
        inputs = self.q, self.local, self.from_others
        flags = options.pop("flags", None)
        out, lse = kernel.attend(*inputs, self.whole, scale, flags, **options)
        grads = [kernel.gradients(self.grad, *inputs, out, lse, self.whole, scale, **options) for _ in range(2)]
        first, again = ([g.q, *g.local, g.received] for g in grads)
        assert all(map(torch.equal, first, again)), "two backward runs differ"
        return out, *grads[0]

    def staged(self, kernel: AttentionKernel, scale: float, **options: Any) -> tuple[Tensor, Tensor, KV, Tensor]:
        out = torch.zeros((*self.q.shape[:2], self.local.v.shape[2]))
        lse = torch.full(self.q.shape[:2], -torch.inf)
        for part in self.parts:
            kernel.merge_into(out, lse, self.q, self.local, self.from_others, part, scale, **options)
        left: list[Tensor] = []
        state = self.grad, self.q, self.local, self.from_others, out, lse, self.whole, scale
        on_received = lambda rows, source=None: left.append(rows.clone())  # noqa: E731
        grads = kernel.gradients(*state, torch.float32, on_received, **options)
        both = left[-1].nan_to_num(), grads.received.nan_to_num()
        assert torch.equal(*both), "received rows' gradients left before they were complete"
        assert grads.local.k.dtype == torch.float32
        if self.q.dtype != torch.float32:
            narrow = kernel.gradients(*state, torch.float32, None, self.q.dtype, **options).received
            assert torch.equal(narrow.nan_to_num(), grads.received.to(self.q.dtype).nan_to_num()), "not rounded once"
        return out, *grads
