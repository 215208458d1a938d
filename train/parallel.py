"""The context-parallel side of a run: which strategy plans, which exchange carries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import flashcp
from flashcp.kernels.tuning import Blocks, Pass, Tuning
from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.plan import ShardingPlan
from flashcp.train.ranks import LONGEST_WAIT_S

__all__ = ["ParallelConfig", "TuningConfig"]


@dataclass
class TuningConfig:
    """Block shapes that replace the Triton kernels' own, pass by pass: query rows x key rows x warps x stages, such as
    `128x64x8x3`, for fp32 also `x` and the precision of products, `ieee` or `tf32x3`. Empty: those of
    `kernels/tuning.py`."""

    forward: str = ""
    backward_kv: str = ""
    backward_q: str = ""

    def read(self) -> Tuning:
        """As the kernels take it. Raises ValueError for text that is no block shape and numbers that none can have."""
        chosen = {}
        for which in Pass:
            text = getattr(self, which.value)
            try:
                chosen[which.value] = Blocks.from_text(text) if text else None
            except ValueError as error:
                raise ValueError(f"parallel.tuning.{which.value}: {error}") from error
        return Tuning(**chosen)


@dataclass
class ParallelConfig:
    """Strategy and its options, and how KV travels (see `flashcp.plan` and `flashcp.ContextParallel`).

    stages: parts in which received rows are computed when staged. heap_mib: most memory for receive buffers on a rank,
    0 for no limit. region_mib: the least that one of them holds. throttle_gbps: GB/s at which rows leave over `shm`.
    """

    sharding: str = "flashcp"
    sharding_options: dict[str, Any] = field(default_factory=dict)
    exchange: str = "exact"
    overlap: str = "auto"
    attention: str = "auto"
    transport: str = "auto"
    backward: str = "keep"
    timeout_s: float = 60.0
    stages: int = 2
    heap_mib: float = 0.0
    region_mib: float = 0.0
    throttle_gbps: float = 0.0
    tuning: TuningConfig = field(default_factory=TuningConfig)

    def check(self, world_size: int, heads: int, kv_heads: int) -> None:
        """Raise ValueError for names that do not exist and heads that the exchange cannot divide."""
        if self.sharding not in flashcp.strategies():
            raise ValueError(f"parallel.sharding={self.sharding!r}: expected one of {', '.join(flashcp.strategies())}")
        if self.exchange not in EXCHANGES:
            raise ValueError(f"parallel.exchange={self.exchange!r}: expected one of {', '.join(EXCHANGES)}")
        if self.exchange == "ulysses" and (heads % world_size or kv_heads % world_size):
            raise ValueError(
                f"parallel.exchange='ulysses' with model.heads={heads}, model.kv_heads={kv_heads}: "
                f"expected multiples of world_size={world_size}"
            )
        if not 0 < self.timeout_s <= LONGEST_WAIT_S:
            raise ValueError(f"parallel.timeout_s={self.timeout_s}: expected seconds > 0 and <= {LONGEST_WAIT_S:.0e}")
        self.tuning.read()
        self.planner(world_size)(np.array([world_size]))  # the strategy's options are checked by using them

    def planner(self, world_size: int) -> Callable[[np.ndarray], ShardingPlan]:
        """Document lengths of a pack -> its plan: what the loader calls ahead of each step."""

        def make_plan(document_lengths: np.ndarray) -> ShardingPlan:
            return flashcp.plan(document_lengths, world_size, self.sharding, **self.sharding_options)

        return make_plan

    def operator(self) -> flashcp.ContextParallel:
        """The attention operator over the default process group, or for one rank alone.

        Raises ValueError for names and block shapes.
        """
        tuning = self.tuning.read()
        try:
            return flashcp.ContextParallel(
                exchange=self.exchange,
                overlap=self.overlap,
                attention=self.attention,
                transport=self.transport,
                backward=self.backward,
                timeout_s=self.timeout_s,
                tuning=tuning,
                stages=self.stages,
                options=flashcp.TransportOptions(self.heap_mib, self.region_mib, self.throttle_gbps),
            )
        except ValueError as error:
            raise ValueError(f"parallel.{error}") from error
