"""`ulysses` (DeepSpeed-Ulysses): all-to-alls turn a split by tokens into a split by heads and back.

Each rank computes every row of the pack for its share of the heads, reading the rows in the order they arrived.
The gradients that travel back are whole, not partial sums, so the wire carries the model's dtype both ways.

Shapes: T local rows, C rows of the pack, N ranks, H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from flashcp.comm.exchanges.base import Exchange, Flight, Job, Kept
from flashcp.comm.transport import Arrival
from flashcp.kernels.cpu import KV
from flashcp.kernels.schedule import Schedule
from flashcp.sharding.plan import ShardingPlan

__all__ = ["Ulysses"]


class Ulysses(Exchange):
    """See the module."""

    name = "ulysses"
    moves_later = True
    gradient_dtype = None
    splits_heads = True

    def start(self, plan: ShardingPlan, k: Tensor, v: Tensor) -> Flight:
        """See Exchange."""
        arrival, buffer = self._by_heads(plan, torch.stack((k, v), dim=1))
        return _HeadsFlight(arrival, buffer, self.layout(plan).gathered_schedule)

    def forward(
        self, plan: ShardingPlan, q: Tensor, k: Tensor, v: Tensor, flight: Flight, job: Job, scale: float
    ) -> tuple[Tensor, Kept]:
        """See Exchange."""
        with job.clock.measure("exchange_ms"):
            arrival, q_all = self._by_heads(plan, q[:, None])
            (schedule,) = flight.arrivals()
            arrival.wait()
        queries, keys, values = q_all[:, 0], flight.buffer[:, 0], flight.buffer[:, 1]
        out = torch.zeros_like(queries, dtype=torch.float32)
        lse = out.new_full(out.shape[:2], -torch.inf)
        with job.clock.measure("attention_ms"):
            nothing = KV(keys[:0], values[:0])
            job.kernel.forward(queries, KV(keys, values), nothing, schedule, scale, out, lse)
        out = out.to(q.dtype)
        with job.clock.measure("exchange_ms"):
            local = self._by_tokens(plan, out[:, None])[:, 0]
        if job.refetch:
            return local, Kept(q, k, v, out, lse, None)
        return local, Kept(queries, keys, values, out, lse, flight.buffer)

    def backward(
        self, plan: ShardingPlan, grad_out: Tensor, kept: Kept, job: Job, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Exchange."""
        queries, keys, values = kept.q, kept.k, kept.v
        with job.clock.measure("exchange_ms"):
            if kept.received is None:
                flight = self.start(plan, keys, values)
                arrival, q_all = self._by_heads(plan, queries[:, None])
                list(flight.arrivals())
                arrival.wait()
                queries, keys, values = q_all[:, 0], flight.buffer[:, 0], flight.buffer[:, 1]
            arrival, grad_all = self._by_heads(plan, grad_out[:, None])
            arrival.wait()
        gradients = [torch.zeros_like(x, dtype=torch.float32) for x in (queries, keys, values)]
        with job.clock.measure("attention_ms"):
            nothing = KV(keys[:0], values[:0])
            job.kernel.backward(
                grad_all[:, 0],
                queries,
                KV(keys, values),
                nothing,
                kept.out,
                kept.lse,
                self.layout(plan).gathered_schedule,
                scale,
                gradients[0],
                KV(*gradients[1:]),
                nothing,
            )
        with job.clock.measure("exchange_ms"):
            wire = grad_out.dtype
            grad_q = self._by_tokens(plan, gradients[0][:, None].to(wire))[:, 0]
            grad_k, grad_v = self._by_tokens(plan, torch.stack(gradients[1:], dim=1).to(wire)).unbind(1)
        return grad_q.float(), grad_k.float(), grad_v.float()

    def _by_heads(self, plan: ShardingPlan, rows: Tensor) -> tuple[Arrival, Tensor]:
        """[T, tensors, heads, D] of all heads -> [C, tensors, heads / N, D] of this rank's, on its way."""
        ranks, own = plan.world_size, self.transport.rank
        leaving = rearrange(rows, "t i (n h) d -> (n t) i h d", n=ranks).contiguous()
        into = leaving.new_empty((int(plan.offsets[-1]), *leaving.shape[1:]))
        sent = [int(plan.tokens[own])] * ranks
        return self.transport.all_to_all(leaving, sent, into, plan.tokens.tolist()), into

    def _by_tokens(self, plan: ShardingPlan, rows: Tensor) -> Tensor:
        """[C, tensors, heads / N, D] of this rank's heads -> [T, tensors, heads, D] of its rows."""
        ranks, own = plan.world_size, int(plan.tokens[self.transport.rank])
        into = rows.new_empty((own * ranks, *rows.shape[1:]))
        self.transport.all_to_all(rows.contiguous(), plan.tokens.tolist(), into, [own] * ranks).wait()
        return rearrange(into, "(n t) i h d -> t i (n h) d", n=ranks)


class _HeadsFlight(Flight):
    def __init__(self, arrival: Arrival, buffer: Tensor, schedule: Schedule) -> None:
        self.buffer = buffer
        self._arrival, self._schedule = arrival, schedule

    def arrivals(self) -> Iterator[Schedule]:
        """See Flight: the whole pack at once."""
        self._arrival.wait()
        yield self._schedule
