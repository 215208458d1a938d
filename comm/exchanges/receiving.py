"""The shape most exchanges share: receive KV, attend, send gradients home.

Shapes: T local rows, R rows of the receive buffer, H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor

from flashcp.comm.clock import span
from flashcp.comm.exchanges.base import Exchange, Job, Kept
from flashcp.comm.exchanges.flight import Flight
from flashcp.comm.exchanges.homecoming import Homecoming
from flashcp.kernels.interface import KV
from flashcp.kernels.schedule import Schedule
from flashcp.sharding.plan import ShardingPlan

__all__ = ["ReceivingExchange"]


class ReceivingExchange(Exchange):
    """Exchanges that bring others' KV rows into a receive buffer; queries stay where they are."""

    @abstractmethod
    def return_gradients(self, plan: ShardingPlan, gradients: Tensor) -> Homecoming:
        """Send the gradients of the receive buffer, fp32 [R, 2, K, D], home."""

    def forward(
        self, plan: ShardingPlan, q: Tensor, k: Tensor, v: Tensor, flight: Flight, job: Job, scale: float
    ) -> tuple[Tensor, Kept]:
        """See Exchange. `none` waits for all rows and computes in one launch, `staged` computes local rows meanwhile
        and merges part by part in fp32, `fused` waits inside its one launch."""
        tensors = (q, KV(k, v), as_kv(flight.inbox.rows))
        out, lse = (self._staged if job.overlap == "staged" else self._at_once)(plan, *tensors, flight, job, scale)
        with job.clock.measure("exposed_exchange_ms"):
            if flight.arrival:
                flight.arrival.wait()  # also for rows that nobody reads here: the region is free only when all landed
            flight.leave()
        kept = Kept(q, k, v, out, lse, flight.inbox.rows, torch.tensor([flight.inbox.ticket]))
        if job.refetch:
            self.release(kept)
            kept = kept._replace(received=None, tickets=None)
        return out, kept

    def _at_once(
        self, plan: ShardingPlan, q: Tensor, local: KV, received: KV, flight: Flight, job: Job, scale: float
    ) -> tuple[Tensor, Tensor]:
        with job.clock.measure("wait_ms", "headers"):
            job.agree()
        arrival = flight.arrival if job.overlap == "fused" else None
        flags = arrival.flags() if arrival else None
        if flags is None:
            with job.clock.measure("exposed_exchange_ms"):
                flight.wait()
        with job.clock.measure("attention_ms", "all tiles, waits inside" if flags else "all tiles"):
            out, lse = job.kernel.attend(q, local, received, self.layout(plan).schedule, scale, flags)
        if arrival and flags:
            arrival.check(flags)
        return out, lse

    def _staged(
        self, plan: ShardingPlan, q: Tensor, local: KV, received: KV, flight: Flight, job: Job, scale: float
    ) -> tuple[Tensor, Tensor]:
        out = q.new_zeros(q.shape, dtype=torch.float32)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        first = self.layout(plan).local_schedule
        for schedule in _chain(first, self._arrivals(flight, job)):
            tiles = "local tiles" if schedule is first else f"remote tiles (from {_sources(schedule)})"
            with job.clock.measure("attention_ms", tiles):
                job.kernel.merge_into(out, lse, q, local, received, schedule, scale)
        return out.to(q.dtype), lse

    def _arrivals(self, flight: Flight, job: Job) -> Iterator[Schedule]:
        with job.clock.measure("wait_ms", "headers"):
            job.agree()
        arrivals = flight.arrivals(job.stages if self.transport.one_sided else 1)
        while True:
            with job.clock.measure("exposed_exchange_ms"):
                schedule = next(arrivals, None)
            if schedule is None:
                return
            yield schedule

    def backward(
        self, plan: ShardingPlan, grad_out: Tensor, kept: Kept, job: Job, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Exchange. Gradients of received rows first: they travel while the local ones are computed."""
        if not self.is_open(kept):
            with job.clock.measure("exposed_exchange_ms", "send rows"):
                flight = self.start(plan, kept.k, kept.v)
            with job.clock.measure("wait_ms", "headers"):
                job.agree()
            with job.clock.measure("exposed_exchange_ms"):
                flight.wait()
                flight.leave()
            kept = kept._replace(received=flight.inbox.rows, tickets=torch.tensor([flight.inbox.ticket]))
        assert kept.received is not None
        homecoming: Homecoming | None = None

        def leave(gradients: Tensor) -> None:
            nonlocal homecoming
            tiles.close()
            with job.clock.measure("exposed_exchange_ms", "send gradients"):
                homecoming = self.return_gradients(plan, gradients)
                if job.overlap == "none":
                    job.agree()
                    homecoming.wait()
            tiles.enter_context(span("gradients of local tiles"))

        with job.clock.measure("attention_ms"), ExitStack() as tiles:
            tiles.enter_context(span("gradients of remote tiles"))
            tensors = grad_out, kept.q, KV(kept.k, kept.v), as_kv(kept.received), kept.out, kept.lse
            gradients = job.kernel.gradients(*tensors, self.layout(plan).schedule, scale, torch.float32, leave)
        self.release(kept)
        assert homecoming is not None
        with job.clock.measure("wait_ms", "headers"):
            job.agree()
        with job.clock.measure("exposed_exchange_ms", "gradients home"):
            homecoming.add_to(gradients.local)
        return gradients.q, *gradients.local


def as_kv(buffer: Tensor) -> KV:
    """The two halves of a buffer [R, 2, K, D], as views."""
    return KV(buffer[:, 0], buffer[:, 1])


def _sources(schedule: Schedule) -> str:
    return ", ".join(map(str, schedule.sources)) or "nobody"


def _chain(first: Schedule, rest: Iterator[Schedule]) -> Iterator[Schedule]:
    yield first
    yield from rest
