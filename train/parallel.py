"""The context-parallel side of a run: which strategy plans, which exchange carries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import flashcp
from flashcp.kernels.tuning import Blocks, Pass, Tuning
from flashcp.limits import Seconds, one_of
from flashcp.sharding.exchanges import EXCHANGES

__all__ = ["ExchangeConfig", "ParallelConfig", "TuningConfig"]


@dataclass
class ExchangeConfig:
    """How KV travels: a name in `EXCHANGES`."""

    name: Annotated[str, one_of(EXCHANGES)] = "exact"

    def check(self, world_size: int, heads: int, kv_heads: int) -> None:
        """Raise ValueError for heads that the exchange cannot divide."""
        if self.name == "ulysses" and (heads % world_size or kv_heads % world_size):
            raise ValueError(
                f"exchange='ulysses' with model.heads={heads}, model.kv_heads={kv_heads}: "
                f"expected multiples of world_size={world_size}"
            )


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
    """The arguments of `flashcp.ContextParallel`, which says what they mean."""

    overlap: str = "auto"
    attention: str = "auto"
    transport: str = "auto"
    backward: str = "keep"
    timeout_s: Seconds = 60.0
    stages: int = 2
    heap_mib: float = 0.0
    region_mib: float = 0.0
    throttle_gbps: float = 0.0
    tuning: TuningConfig = field(default_factory=TuningConfig)

    def check(self) -> None:
        """Raise ValueError for text that is no block shape; `operator` checks the names."""
        self.tuning.read()

    def operator(self, exchange: str) -> flashcp.ContextParallel:
        """The attention operator over the default process group, or for one rank alone.

        Raises ValueError for names and block shapes.
        """
        tuning = self.tuning.read()
        try:
            return flashcp.ContextParallel(
                exchange=exchange,
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
