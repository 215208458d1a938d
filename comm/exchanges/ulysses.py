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

from flashcp.comm.exchanges.base import Exchange, Job, Kept
from flashcp.comm.exchanges.flight import Flight
from flashcp.comm.rows import Inbox, WholeRows
from flashcp.comm.transport import Arrival
from flashcp.kernels.interface import KV
from flashcp.kernels.schedule import Schedule
from flashcp.sharding.plan import ShardingPlan

__all__ = ["Ulysses"]


class Ulysses(Exchange):
    """See the module."""

    name = "ulysses"
    moves_later = True
    gradient_dtype = None
    splits_heads = True

    def start(self, plan: ShardingPlan, k: Tensor, v: Tensor) -> _Whole:
        """See Exchange."""
        return self._by_heads(plan, torch.stack((k, v), dim=1))

    def forward(
        self, plan: ShardingPlan, q: Tensor, k: Tensor, v: Tensor, flight: Flight, job: Job, scale: float
    ) -> tuple[Tensor, Kept]:
        """See Exchange."""
        with job.clock.measure("wait_ms", "headers"):
            job.agree()
        with job.clock.measure("exposed_exchange_ms", "send queries"):
            asked = self._by_heads(plan, q[:, None], "queries")
            flight.wait()
            asked.wait()
        queries, keys, values = asked.inbox.rows[:, 0], *flight.inbox.rows.unbind(1)
        with job.clock.measure("attention_ms", "all tiles"):
            nothing = KV(keys[:0], values[:0])
            out, lse = job.kernel.attend(queries, KV(keys, values), nothing, self.layout(plan).gathered_schedule, scale)
        with job.clock.measure("exposed_exchange_ms", "send outputs"):
            local = self._by_tokens(plan, out[:, None], "outputs")[:, 0]
            flight.leave()
            asked.leave()
        tickets = torch.tensor([asked.inbox.ticket, flight.inbox.ticket])
        kept = Kept(q, k, v, out, lse, flight.inbox.rows, tickets, asked.inbox.rows)
        if job.refetch:
            self.release(kept)
            kept = kept._replace(received=None, tickets=None, queries=None)
        return local, kept

    def backward(
        self, plan: ShardingPlan, grad_out: Tensor, kept: Kept, job: Job, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Exchange."""
        with job.clock.measure("wait_ms", "headers"):
            job.agree()
        with job.clock.measure("exposed_exchange_ms", "send gradients of outputs"):
            pulled = self._by_heads(plan, grad_out[:, None], "gradients")
            if not self.is_open(kept):
                flight, asked = self.start(plan, kept.k, kept.v), self._by_heads(plan, kept.q[:, None], "queries")
                for each in (flight, asked):
                    each.wait()
                    each.leave()
                tickets = torch.tensor([asked.inbox.ticket, flight.inbox.ticket])
                kept = kept._replace(received=flight.inbox.rows, tickets=tickets, queries=asked.inbox.rows)
            pulled.wait()
            pulled.leave()
        assert kept.received is not None
        assert kept.queries is not None
        keys, values = kept.received.unbind(1)
        nothing, schedule = KV(keys[:0], values[:0]), self.layout(plan).gathered_schedule
        with job.clock.measure("attention_ms", "gradients of all tiles"):
            grad_all, queries = pulled.inbox.rows[:, 0], kept.queries[:, 0]
            tensors = grad_all, queries, KV(keys, values), nothing, kept.out, kept.lse
            gradients = job.kernel.gradients(*tensors, schedule, scale)
        self.transport.free(pulled.inbox.ticket)
        self.release(kept)
        with job.clock.measure("exposed_exchange_ms", "gradients home"):
            grad_q = self._by_tokens(plan, gradients.q[:, None], "gradients")[:, 0]
            grad_k, grad_v = self._by_tokens(plan, torch.stack(gradients.local, dim=1), "gradients").unbind(1)
        return grad_q, grad_k, grad_v

    def _by_heads(self, plan: ShardingPlan, rows: Tensor, what: str = "rows") -> _Whole:
        """[T, tensors, heads, D] of all heads -> [C, tensors, heads / N, D] of this rank's, on its way."""
        ranks, own = plan.world_size, self.transport.rank
        leaving = rearrange(rows, "t i (n h) d -> (n t) i h d", n=ranks).contiguous()
        tokens = plan.tokens.tolist()
        inbox = self.transport.inbox(sum(tokens), sum(tokens), leaving.shape[1:], leaving)
        offsets = [sum(tokens[:own])] * ranks
        arrival = self.transport.all_to_all(WholeRows(leaving, what), [tokens[own]] * ranks, inbox, tokens, offsets)
        return _Whole(arrival, inbox, self.layout(plan).gathered_schedule)

    def _by_tokens(self, plan: ShardingPlan, rows: Tensor, what: str) -> Tensor:
        """[C, tensors, heads / N, D] of this rank's heads -> [T, tensors, heads, D] of its rows."""
        ranks, own, tokens = plan.world_size, self.transport.rank, plan.tokens.tolist()
        inbox = self.transport.inbox(tokens[own] * ranks, max(tokens) * ranks, rows.shape[1:], rows)
        offsets = [count * own for count in tokens]
        leaving = WholeRows(rows.contiguous(), what)
        arrival = self.transport.all_to_all(leaving, tokens, inbox, [tokens[own]] * ranks, offsets)
        arrival.wait()
        arrival.leave()
        whole = rearrange(inbox.rows, "(n t) i h d -> t i (n h) d", n=ranks).clone()
        self.transport.free(inbox.ticket)
        return whole


class _Whole(Flight):
    """Every row of the pack for this rank's heads."""

    def __init__(self, arrival: Arrival, inbox: Inbox, schedule: Schedule) -> None:
        self.inbox = inbox
        self._arrival, self._schedule = arrival, schedule

    def arrivals(self, stages: int) -> Iterator[Schedule]:
        """See Flight: the whole pack at once."""
        self._arrival.wait()
        yield self._schedule

    def leave(self) -> None:
        """See Flight."""
        self._arrival.leave()
