"""A route says which KV rows travel from which rank to which: a pure function of a plan and an exchange."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flashcp.sharding.assignment import Assignment
from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.shards import Segments

__all__ = ["Route"]


@dataclass(frozen=True, eq=False, repr=False)
class Route:
    """The traffic of one plan under one exchange. Raises ValueError for an exchange it does not know."""

    plan: Assignment
    exchange: str

    def __post_init__(self) -> None:
        if not isinstance(self.exchange, str) or self.exchange not in EXCHANGES:
            raise ValueError(f"exchange={self.exchange!r}: expected one of {', '.join(EXCHANGES)}")

    @property
    def sent_rows(self) -> np.ndarray:
        """KV rows (K and V of one token) that leave each rank in the forward pass, padding counted [world_size].

        Whole numbers, but for `ulysses`, whose rows are split by heads.
        """
        return self._rows[0]

    @property
    def received_rows(self) -> np.ndarray:
        """KV rows that reach each rank in the forward pass, padding counted [world_size]."""
        return self._rows[1]

    @property
    def critical_rows(self) -> int | float:
        """Largest max(sent, received) of a rank: what the slowest link carries."""
        return np.maximum(*self._rows).max().item()

    @property
    def saving(self) -> float:
        """1 - critical rows / the all-gather's rows T (N - 1); 0 for one rank."""
        ranks = self.plan.world_size
        if ranks == 1:
            return 0.0
        return 1.0 - self.critical_rows * ranks / (int(self.plan.offsets[-1]) * (ranks - 1))

    @property
    def imbalance(self) -> float:
        """Max/mean of what ranks compute: the plan's, but 1.0 for `ulysses`, which shares out heads."""
        return 1.0 if self.exchange == "ulysses" else self.plan.imbalance

    def received(self, rank: int) -> Segments:
        """What lies where in a rank's receive buffer; `rank` of a segment is the owner of its rows."""
        self.plan.check_rank(rank)
        return EXCHANGES[self.exchange].received(self.plan, rank)

    def sent(self, rank: int) -> Segments:
        """Which local rows of a rank leave, in order; `rank` of a segment is the reader, where there is one."""
        self.plan.check_rank(rank)
        return EXCHANGES[self.exchange].sent(self.plan, rank)

    def segments(self, source: int, destination: int) -> list[tuple[int, int, int]]:
        """Row ranges (document, start, stop) that one rank gets from another, in buffer order."""
        self.plan.check_rank(source)
        arriving = self.received(destination)
        chosen = arriving.take((arriving.rank == source) & (arriving.rank != destination))
        return list(zip(*(column.tolist() for column in chosen[:3]), strict=True))

    def bytes(
        self, query_heads: int, kv_heads: int, head_dim: int, dtype_bytes: int, backward: bool = False
    ) -> np.ndarray:
        """Bytes that leave each rank, all tensors counted, int64 [world_size].

        backward=True: the backward's bytes alone, dtype_bytes being the wire's. Gradients of the received rows go
        home, so what a rank received in the forward it sends in the backward, at the wire's width.
        """
        ranks = self.plan.world_size
        if kv_heads < 1 or query_heads < 1 or query_heads % kv_heads:
            raise ValueError(f"query_heads={query_heads}, kv_heads={kv_heads}: expected a multiple, both at least 1")
        if self.exchange == "ulysses":
            if query_heads % ranks or kv_heads % ranks:
                raise ValueError(
                    f"query_heads={query_heads}, kv_heads={kv_heads}: ulysses expects multiples of world_size={ranks}"
                )
            own = self.plan.tokens * (ranks - 1)
            others = self.plan.offsets[-1] - self.plan.tokens
            inward, outward = (own, others) if not backward else (others, own)
            heads = inward * (query_heads + 2 * kv_heads) + outward * query_heads
            return heads // ranks * head_dim * dtype_bytes
        moved = self.received_rows if backward else self.sent_rows
        return moved * (2 * kv_heads * head_dim * dtype_bytes)

    @cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        sent, received = EXCHANGES[self.exchange].rows(self.plan)
        sent.flags.writeable = received.flags.writeable = False
        return sent, received

    def __repr__(self) -> str:
        return (
            f"Route({self.exchange}: {self.plan.world_size} ranks, critical rows {self.critical_rows}, "
            f"saving {self.saving:.3f})"
        )
