"""The context-parallel side of a run: which strategy plans, which exchange carries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import torch.distributed as dist

import flashcp
from flashcp.clusters import clusters
from flashcp.kernels.tuning import Blocks, Pass, Tuning
from flashcp.limits import Limit, Seconds, one_of
from flashcp.sharding.documents import MOST_RANKS
from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.holders import members_heads
from flashcp.sharding.values import shown

AUTO = "auto"
FREE = "free"
"""As a link: rows leave at once."""
SLOWING = ("shm", "cuda_symmetric")
"""Transports that can make rows leave slowly."""
HeadRanks = Annotated[Any, Limit(lambda value: _are_head_ranks(value), "auto or a whole number >= 1")]


@dataclass
class ExchangeConfig:
    """How KV travels: a name in `EXCHANGES`."""

    name: Annotated[str, one_of(EXCHANGES)] = "exact"

    def check(self, world_size: int, heads: int, kv_heads: int) -> None:
        """Raise ValueError for heads that the exchange cannot divide."""
        if self.name == "ulysses":
            _share_heads("exchange='ulysses'", heads, kv_heads, world_size)


@dataclass
class TuningConfig:
    """Block shapes that replace the Triton kernels' own, pass by pass, such as `128x64x8x3`; empty: those stay.

    deterministic: see `flashcp.kernels.tuning.Tuning`.
    """

    forward: str = ""
    backward_kv: str = ""
    backward_q: str = ""
    deterministic: bool = True

    def read(self) -> Tuning:
        """As the kernels take it. Raises ValueError for text that is no block shape and numbers that none can have."""
        chosen = {}
        for which in Pass:
            text = getattr(self, which.value)
            try:
                chosen[which.value] = Blocks.from_text(text) if text else None
            except ValueError as error:
                raise ValueError(f"parallel.tuning.{which.value}: {error}") from error
        return Tuning(chosen["forward"], chosen["backward_kv"], chosen["backward_q"], self.deterministic)


@dataclass
class ParallelConfig:
    """The arguments of `flashcp.ContextParallel`, which says what they mean, and the link (`flashcp/train/link.py`).

    cluster: what the job runs on: `flashcp` chooses plans by predicted time there. head_ranks: a number, or `auto`, the
    fastest there (`flashcp/train/head_ranks.py`).
    """

    overlap: str = "auto"
    attention: str = "auto"
    transport: str = "auto"
    backward: str = "keep"
    gradient_wire: str = "auto"
    verify_rows: bool = False
    timeout_s: Seconds = 60.0
    stages: int = 2
    head_ranks: HeadRanks = 1
    cluster: str = ""
    heap_mib: float = 0.0
    region_mib: float = 0.0
    throttle_gbps: float = 0.0
    link: str = FREE
    tuning: TuningConfig = field(default_factory=TuningConfig)

    def check_heads(self, world_size: int, heads: int, kv_heads: int, exchange: ExchangeConfig) -> None:
        """Raise ValueError for head ranks that do not divide ranks and heads, and where the exchange between holders
        cannot divide what is left. `auto` takes one of those that do; 1 is among them."""
        if self.head_ranks == AUTO:
            return exchange.check(world_size, heads, kv_heads)
        if world_size % self.head_ranks:
            raise ValueError(
                f"parallel.head_ranks={self.head_ranks}: expected a number that divides world_size={world_size}"
            )
        shared = _share_heads(f"parallel.head_ranks={self.head_ranks}", heads, kv_heads, self.head_ranks)
        exchange.check(world_size // self.head_ranks, *shared)

    def check(self) -> None:
        """Raise ValueError for text that is no block shape, link or cluster; `operator` checks the other names."""
        self.tuning.read()
        if self.cluster not in clusters() and (self.cluster or self.head_ranks == AUTO):
            auto = "" if self.cluster else f" with parallel.head_ranks={AUTO}"
            raise ValueError(f"parallel.cluster={shown(self.cluster)}{auto}: expected one of {', '.join(clusters())}")
        if self.link != FREE and self.link not in clusters():
            raise ValueError(f"parallel.link={shown(self.link)}: expected one of {FREE}, {', '.join(clusters())}")
        if self.link != FREE and self.throttle_gbps:
            raise ValueError(
                f"parallel.throttle_gbps={self.throttle_gbps:g} with parallel.link={self.link}: expected 0, for the "
                "link has a rate of its own"
            )

    def operator(
        self, exchange: str, link_gbps: float = 0.0, group: dist.ProcessGroup | None = None
    ) -> flashcp.ContextParallel:
        """The attention operator over a group (None: the default one), or for one rank alone.

        link_gbps: GB/s at which rows leave over `link`; 0: as `throttle_gbps` says.
        Raises ValueError for names and block shapes, and where rows should leave slowly and the transport does not slow
        them.
        """
        tuning = self.tuning.read()
        gbps = link_gbps or self.throttle_gbps
        try:
            operator = flashcp.ContextParallel(
                group,
                exchange=exchange,
                overlap=self.overlap,
                attention=self.attention,
                transport=self.transport,
                backward=self.backward,
                gradient_wire=self.gradient_wire,
                verify_rows=self.verify_rows,
                timeout_s=self.timeout_s,
                tuning=tuning,
                stages=self.stages,
                options=flashcp.TransportOptions(self.heap_mib, self.region_mib, gbps),
                head_ranks=self.head_ranks,
            )
        except ValueError as error:
            raise ValueError(f"parallel.{error}") from error
        if operator.world_size > 1 and operator.throttle_gbps != gbps:
            raise ValueError(
                f"parallel.transport={operator.transport!r}: rows leave at once there, not at {gbps:.3g} GB/s; "
                f"expected one of {', '.join(SLOWING)}"
            )
        return operator


def _are_head_ranks(value: object) -> bool:
    return value == AUTO if isinstance(value, str) else type(value) is int and 1 <= value <= MOST_RANKS


def _share_heads(field: str, heads: int, kv_heads: int, ranks: int) -> tuple[int, int]:
    """Query and KV heads of a rank. Raises ValueError where `field` asks for what these heads do not allow."""
    try:
        return members_heads(heads, kv_heads, ranks)
    except ValueError as error:
        raise ValueError(f"{field} with model.{str(error).replace('query_heads', 'heads', 1)}") from error
