"""What every exchange offers, and the shape most share: receive KV, attend, send gradients home.

Shapes: T local rows, R rows of the receive buffer, H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from flashcp.comm.clock import Clock
from flashcp.comm.transport import Arrival, Transport
from flashcp.kernels.cpu import KV
from flashcp.kernels.schedule import Schedule, build_schedule
from flashcp.kernels.selection import AttentionKernel
from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.plan import Segments, ShardingPlan

__all__ = ["Exchange", "Flight", "Job", "Kept", "Layout", "ReceivingExchange"]


@dataclass(frozen=True)
class Job:
    """How attention is computed: the kernel, whether it waits for all rows first, whether KV is fetched twice."""

    kernel: AttentionKernel
    overlap: str
    refetch: bool
    clock: Clock


class Layout:
    """One plan as a rank's exchange sees it: what leaves, what arrives where, what is computed from it."""

    def __init__(self, exchange: str, plan: ShardingPlan, rank: int) -> None:
        self.exchange, self.plan, self.rank = exchange, plan, rank
        self.local: Segments = plan.local(rank)
        self.received: Segments = EXCHANGES[exchange].received(plan, rank)
        self.sent: Segments = EXCHANGES[exchange].sent(plan, rank)
        self.schedule_of_source = lru_cache(maxsize=None)(self._schedule_of_source)

    @cached_property
    def sent_index(self) -> Tensor:
        """Local rows in the order they leave."""
        return torch.from_numpy(self.sent.buffer_rows())

    @cached_property
    def local_schedule(self) -> Schedule:
        """What the local rows alone contribute."""
        return build_schedule(self.local, local=self.local)

    @cached_property
    def received_schedule(self) -> Schedule:
        """What the received rows contribute, all sources at once."""
        return build_schedule(self.local, received=self.received)

    @cached_property
    def gathered_schedule(self) -> Schedule:
        """The whole pack computed from the receive buffer, queries too."""
        return build_schedule(self.received, local=self.received)

    def _schedule_of_source(self, source: int) -> Schedule:
        """What the rows received from one rank contribute."""
        return build_schedule(self.local, received=self.received.take(self.received.rank == source))


class Flight(ABC):
    """KV on its way to this rank. `buffer`: the receive buffer [R, 2 (K and V), K, D]."""

    buffer: Tensor

    @abstractmethod
    def arrivals(self) -> Iterator[Schedule]:
        """As rows arrive, the schedules that can now run; together they cover the whole receive buffer."""


class Kept(NamedTuple):
    """Tensors an exchange keeps for its backward; `out` is [T, H, D] unless the exchange computes elsewhere."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    received: Tensor | None


class Exchange(ABC):
    """One way for KV to travel. `name` is a key of `flashcp.sharding.exchanges.EXCHANGES`.

    gradient_dtype is what the wire carries in the backward pass; None: the model's. splits_heads: whether ranks
    share out heads, so that their number must divide query and KV heads. moves_later: whether rows also travel while
    attention is computed, so that ranks must come to that together.
    """

    name: str
    moves_later = False
    splits_heads = False
    gradient_dtype: torch.dtype | None = torch.float32

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.layout = lru_cache(maxsize=4)(lambda plan: Layout(self.name, plan, transport.rank))

    def check(self, query_heads: int, kv_heads: int) -> None:
        """Raises ValueError for head counts this exchange cannot split."""
        ranks = self.transport.world_size
        if self.splits_heads and (query_heads % ranks or kv_heads % ranks):
            raise ValueError(
                f"query_heads={query_heads}, kv_heads={kv_heads}: exchange {self.name!r} on {ranks} ranks expects "
                f"multiples of {ranks}"
            )

    @abstractmethod
    def start(self, plan: ShardingPlan, k: Tensor, v: Tensor) -> Flight:
        """Let the K and V rows leave."""

    @abstractmethod
    def forward(
        self, plan: ShardingPlan, q: Tensor, k: Tensor, v: Tensor, flight: Flight, job: Job, scale: float
    ) -> tuple[Tensor, Kept]:
        """Attention of this rank's queries, [T, H, D] in q's dtype, and what the backward needs."""

    @abstractmethod
    def backward(
        self, plan: ShardingPlan, grad_out: Tensor, kept: Kept, job: Job, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of this rank's q, k and v, fp32."""


class ReceivingExchange(Exchange):
    """Exchanges that bring others' KV rows into a receive buffer; queries stay where they are."""

    @abstractmethod
    def return_gradients(self, plan: ShardingPlan, gradients: Tensor) -> Homecoming:
        """Send the gradients of the receive buffer, fp32 [R, 2, K, D], home."""

    def forward(
        self, plan: ShardingPlan, q: Tensor, k: Tensor, v: Tensor, flight: Flight, job: Job, scale: float
    ) -> tuple[Tensor, Kept]:
        """See Exchange. With overlap `none` all rows arrive first; otherwise local rows are computed meanwhile."""
        out = q.new_zeros(q.shape, dtype=torch.float32)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        arrivals = _timed(flight.arrivals(), job.clock)
        waiting = list(arrivals) if job.overlap == "none" else arrivals
        local, received = KV(k, v), as_kv(flight.buffer)
        for schedule in _chain(self.layout(plan).local_schedule, waiting):
            with job.clock.measure("attention_ms"):
                job.kernel.forward(q, local, received, schedule, scale, out, lse)
        out = out.to(q.dtype)
        return out, Kept(q, k, v, out, lse, None if job.refetch else flight.buffer)

    def backward(
        self, plan: ShardingPlan, grad_out: Tensor, kept: Kept, job: Job, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Exchange. Gradients of received rows first: they travel while the local ones are computed."""
        received = kept.received
        if received is None:
            flight = self.start(plan, kept.k, kept.v)
            for _ in _timed(flight.arrivals(), job.clock):
                pass
            received = flight.buffer
        layout = self.layout(plan)
        grad_q = torch.zeros_like(kept.q, dtype=torch.float32)
        grad_local = KV(*(torch.zeros_like(x, dtype=torch.float32) for x in (kept.k, kept.v)))
        grad_received = torch.zeros_like(received, dtype=torch.float32)

        def compute(schedule: Schedule) -> None:
            with job.clock.measure("attention_ms"):
                job.kernel.backward(
                    grad_out,
                    kept.q,
                    KV(kept.k, kept.v),
                    as_kv(received),
                    kept.out,
                    kept.lse,
                    schedule,
                    scale,
                    grad_q,
                    grad_local,
                    as_kv(grad_received),
                )

        compute(layout.received_schedule)
        with job.clock.measure("exchange_ms"):
            homecoming = self.return_gradients(plan, grad_received)
            if job.overlap == "none":
                homecoming.wait()
        compute(layout.local_schedule)
        with job.clock.measure("exchange_ms"):
            homecoming.add_to(grad_local)
        return grad_q, *grad_local


class Homecoming(ABC):
    """Gradients on their way to the owners of the rows."""

    @abstractmethod
    def wait(self) -> None:
        """Return when all have arrived."""

    @abstractmethod
    def add_to(self, gradients: KV) -> None:
        """Add what arrived to the local gradients, source by source in a fixed order."""


class ReturnedRows(Homecoming):
    """Gradients that come home in one slot per reader: slots[i] [rows, 2, K, D] for the local rows index[i]."""

    def __init__(self, arrival: Arrival, slots: Sequence[Tensor], index: Sequence[Tensor]) -> None:
        self._arrival, self._slots, self._index = arrival, slots, index

    def wait(self) -> None:
        """See Homecoming."""
        self._arrival.wait()

    def add_to(self, gradients: KV) -> None:
        """See Homecoming. Slots in rank order; rows of one slot are distinct, so the sum is repeatable."""
        self.wait()
        for index, slot in zip(self._index, self._slots, strict=True):
            for total, part in zip(gradients, slot.unbind(1), strict=True):
                total.index_add_(0, index, part)


def as_kv(buffer: Tensor) -> KV:
    """The two halves of a buffer [R, 2, K, D], as views."""
    return KV(buffer[:, 0], buffer[:, 1])


def pack_rows(k: Tensor, v: Tensor, index: Tensor) -> Tensor:
    """K and V of some local rows side by side, [rows, 2, K, D]: what leaves in one message."""
    packed = k.new_empty((len(index), 2, *k.shape[1:]))
    packed[:, 0] = k[index]
    packed[:, 1] = v[index]
    return packed


def _chain(first: Schedule, rest: Iterator[Schedule] | list[Schedule]) -> Iterator[Schedule]:
    yield first
    yield from rest


def _timed(arrivals: Iterator[Schedule], clock: Clock) -> Iterator[Schedule]:
    while True:
        with clock.measure("exchange_ms"):
            schedule = next(arrivals, None)
        if schedule is None:
            return
        yield schedule
