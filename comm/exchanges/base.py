"""What every exchange offers.

Shapes: T local rows, H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from flashcp.comm.clock import Clock
from flashcp.comm.exchanges.flight import Flight, Layout
from flashcp.comm.transport import Transport
from flashcp.kernels.interface import AttentionKernel
from flashcp.sharding.plan import ShardingPlan

__all__ = ["Exchange", "Job", "Kept"]


@dataclass(frozen=True)
class Job:
    """How attention is computed: the kernel, the overlap, in how many parts received rows are computed when staged,
    whether KV is fetched twice.

    agree: returns when all ranks said that they do the same; called before others' rows are read.
    """

    kernel: AttentionKernel
    overlap: str
    stages: int
    refetch: bool
    clock: Clock
    agree: Callable[[], None]


class Kept(NamedTuple):
    """Tensors an exchange keeps for its backward; `out` is [T, H, D] unless the exchange computes elsewhere.

    received: the rows of the inbox, and tickets: what the transport knows its inboxes by, as a tensor, so that both are
    saved and computed again together; None where the rows are to be fetched again. queries: gathered ones (`ulysses`).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    received: Tensor | None
    tickets: Tensor | None
    queries: Tensor | None = None


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

    def is_open(self, kept: Kept) -> bool:
        """Whether the rows that were received still lie where they were."""
        return kept.tickets is not None and all(map(self.transport.is_open, kept.tickets.tolist()))

    def release(self, kept: Kept) -> None:
        """What was received is read no more; on all ranks at the same point of the program."""
        if kept.tickets is not None:
            for ticket in kept.tickets.tolist():
                self.transport.free(ticket)

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
