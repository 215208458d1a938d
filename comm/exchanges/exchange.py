"""What every exchange offers, and what it works with.

Shapes: T local rows, R rows of the receive buffer, H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashcp.comm.clock import Clock
from flashcp.comm.transport import Inbox, Transfer, Transport
from flashcp.kernels.interface import KV, AttentionKernel
from flashcp.kernels.schedule import Schedule, build_schedule
from flashcp.kernels.scores import Scores
from flashcp.kernels.uploads import Uploaded
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.route import is_fp32
from flashcp.sharding.shards import Segments


@dataclass(frozen=True)
class AttentionSettings:
    """How attention is computed: the kernel, the overlap, in how many parts received rows are computed when staged,
    whether KV is fetched twice, what gradients travel in (`wire`).

    kv_heads: of the rows that the exchange is given. agree: returns when all ranks said that they do the same; called
    before others' rows are read. scores: known when queries come.
    """

    kernel: AttentionKernel
    overlap: str
    stages: int
    refetch: bool
    gradient_wire: str
    kv_heads: int
    clock: Clock
    agree: Callable[[], None]
    scores: Scores

    def wire(self, model: torch.dtype, roundings: int) -> torch.dtype:
        """What gradients travel in (`flashcp.sharding.route.is_fp32`)."""
        return torch.promote_types(model, torch.float32) if is_fp32(self.gradient_wire, roundings) else model

    def meet(self) -> None:
        """Agree; the time counts as waiting for slower ranks."""
        with self.clock.measure("wait_ms", "headers"):
            self.agree()


class IncomingKV(NamedTuple):
    """KV on its way to this rank, and this rank's own to others.

    inbox: where it arrives, [R, 2 (K and V), K, D]. transfer: its way there; once it has left, k and v may be written
    to.
    parts: as rows arrive, the schedules that can now run; together they cover the whole receive buffer. Its argument:
    how many there are, where the exchange leaves the choice. None of an exchange that computes all at once.
    onward: K and V of this rank's share of the heads, and they on their way to other holders (`heads.py`).
    """

    inbox: Inbox
    transfer: Transfer
    parts: Callable[[int], Iterator[Schedule]] = lambda stages: iter(())
    onward: tuple[KV, IncomingKV] | None = None


class Saved(NamedTuple):
    """Tensors an exchange saves for its backward.

    received: the rows of the inbox, and tickets: what the transport knows its inboxes by, as a tensor, so that both are
    saved and computed again together; None where the rows are to be fetched again.
    """

    q: Tensor  # [T, H, D]
    k: Tensor  # [T, K, D]
    v: Tensor  # [T, K, D]
    out: Tensor  # [T, H, D]
    lse: Tensor  # [T, H]
    received: Tensor | None  # [R, 2, K, D]
    tickets: Tensor | None


class InputGradients(NamedTuple):
    """Of a rank's q [T, H, D], k and v [T, K, D]; and what its queries add to the gradient of the sinks, fp32 [H]."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None


class Layout:
    """One plan as a rank's exchange sees it: what leaves, what arrives where, what is computed from it."""

    def __init__(self, exchange: str, plan: ShardingPlan, rank: int) -> None:
        self.exchange, self.plan, self.rank = exchange, plan, rank
        self.local: Segments = plan.local(rank)
        route = plan.route(exchange)
        self.received: Segments = route.received(rank)
        self.sent: Segments = route.sent(rank)
        self.schedule_of = lru_cache(maxsize=None)(self._schedule_of)
        self._sent_index = lru_cache(maxsize=None)(lambda device: Uploaded(self.sent.buffer_rows(), device))

    def sent_index(self, device: torch.device) -> Tensor:
        """Local rows in the order they leave."""
        return self._sent_index(device).here()

    @cached_property
    def schedule(self) -> Schedule:
        """All that this rank computes."""
        return build_schedule(self.local, local=self.local, received=self.received, masks=self.plan.masks)

    @cached_property
    def local_schedule(self) -> Schedule:
        """What the local rows alone contribute."""
        return build_schedule(self.local, local=self.local, masks=self.plan.masks)

    def stages(self, parts: int) -> list[tuple[int, ...]]:
        """Sources in about equal parts, in the order in which their rows come: rank - 1 first, rank + 1 last."""
        sources = set(self.received.rank.tolist()) - {self.rank}
        ranks = self.plan.world_size
        order = [source for i in range(1, ranks) if (source := (self.rank - i) % ranks) in sources]
        cuts = [len(order) * i // parts for i in range(parts + 1)]
        return [tuple(order[a:b]) for a, b in pairwise(cuts) if b > a]

    def incoming(self, transfer: Transfer, inbox: Inbox) -> IncomingKV:
        """Rows of all ranks that leave and arrive in one operation."""

        def parts(stages: int) -> Iterator[Schedule]:
            for sources in self.stages(stages):
                for source in sources:
                    transfer.wait(source)
                yield self.schedule_of(sources)

        return IncomingKV(inbox, transfer, parts)

    def _schedule_of(self, sources: tuple[int, ...]) -> Schedule:
        """What the rows received from some ranks contribute."""
        received = self.received.take(np.isin(self.received.rank, sources))
        return build_schedule(self.local, received=received, masks=self.plan.masks)


class Exchange(ABC):
    """One way for KV to travel. `name` is a key of `flashcp.sharding.exchanges.EXCHANGES`.

    splits_heads: whether ranks share out heads, as `flashcp.sharding.holders.members_heads` does. moves_later: whether
    rows also travel while attention is computed, so that ranks must come to that together. inputs_wait: whether the
    backward needs q, k, v and the output as they are here, or only others in their place. meet: returns when all ranks
    are known to do the same, for exchanges that read others' rows before attention.
    """

    name: str
    moves_later = False
    inputs_wait = True
    splits_heads = False

    def __init__(self, transport: Transport, meet: Callable[[], None]) -> None:
        self.transport, self.meet = transport, meet
        self.layout = lru_cache(maxsize=4)(lambda plan: Layout(self.name, plan, transport.rank))

    @property
    def puts(self) -> bool:
        """Whether rows are put into others' memory, which an error may leave in different states."""
        return self.transport.one_sided

    def tokens(self, plan: ShardingPlan) -> int:
        """Rows of this rank."""
        return int(plan.tokens[self.transport.rank])

    def check(self, query_heads: int, kv_heads: int) -> None:
        """Raises ValueError for head counts this exchange cannot split."""
        return

    @abstractmethod
    def start(self, plan: ShardingPlan, k: Tensor, v: Tensor) -> IncomingKV:
        """Let the K and V rows [T, K, D] leave."""

    @abstractmethod
    def forward(
        self, plan: ShardingPlan, q: Tensor, local: KV, incoming: IncomingKV, settings: AttentionSettings
    ) -> tuple[Tensor, Saved]:
        """Attention of this rank's queries, [T, H, D] in q's dtype, and what the backward needs."""

    @abstractmethod
    def backward(
        self, plan: ShardingPlan, grad_out: Tensor, saved: Saved, settings: AttentionSettings
    ) -> InputGradients:
        """Gradients of this rank's q, k and v, and its part of the sinks'."""

    def log_sums(self, plan: ShardingPlan, saved: Saved) -> Tensor:
        """Log-sum-exp of this rank's queries, fp32 [T, H]. All ranks ask together."""
        return saved.lse

    def is_open(self, saved: Saved) -> bool:
        """Whether the rows that were received still lie where they were."""
        return saved.tickets is not None and all(map(self.transport.is_open, saved.tickets.tolist()))

    def release(self, saved: Saved) -> None:
        """What was received is read no more; on all ranks at the same point of the program."""
        if saved.tickets is not None:
            for ticket in saved.tickets.tolist():
                self.transport.free(ticket)

    def held(self, saved: Saved, settings: AttentionSettings) -> Saved:
        """What waits for the backward: without what was received, where that is to be fetched again."""
        if not settings.refetch:
            return saved
        self.release(saved)
        return saved._replace(received=None, tickets=None)


def as_kv(buffer: Tensor) -> KV:
    """The two halves of a buffer [R, 2, K, D], as views."""
    return KV(buffer[:, 0], buffer[:, 1])
