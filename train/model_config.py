"""The decoder's size and shape, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from flashcp.limits import Count, Limit, Natural, Rows
from flashcp.schema import read_dataclass
from flashcp.sharding.mask import Mask

Finite = Annotated[float, Limit(lambda value: 0 < value < math.inf, "a finite number > 0")]
NotNegative = Annotated[float, Limit(lambda value: 0 <= value < math.inf, "a finite number >= 0")]


@dataclass
class ModelConfig:
    """Size and shape of the decoder, as `conf/train.yaml` explains them."""

    layers: Count = 4
    dim: Count = 256
    heads: Count = 8
    kv_heads: Count = 4
    ffn_dim: Natural = 0
    vocab_size: Natural = 0
    rope_theta: Finite = 500_000.0
    norm_eps: Finite = 1e-5
    tied_embeddings: bool = False
    checkpoint_activations: bool = False
    window: Rows = 0
    chunk: Rows = 0
    full_every: Natural = 0
    softcap: NotNegative = 0.0
    sinks: bool = False
    latent: Natural = 0

    def limits(self, layer: int) -> dict[str, int | None]:
        """How far a layer looks back, as `flashcp.ContextParallel.attention` takes it."""
        sees_all = self.full_every and (layer + 1) % self.full_every == 0
        return (
            {"window": None, "chunk": None}
            if sees_all
            else {"window": self.window or None, "chunk": self.chunk or None}
        )

    def mix(self) -> list[tuple[Mask, int]] | None:
        """The layers as `flashcp.plan` takes them; None where all see all that is before them."""
        limited = Mask("window", self.window) if self.window else Mask("chunk", self.chunk) if self.chunk else Mask()
        if limited.is_causal:
            return None
        few = sum(any(self.limits(layer).values()) for layer in range(self.layers))
        return [(mask, count) for mask, count in ((Mask(), self.layers - few), (limited, few)) if count]

    def check(self) -> None:
        """Raise ValueError for sizes that make no model."""
        read_dataclass(ModelConfig, vars(self), "model")  # each by itself
        if self.window and self.chunk:
            raise ValueError(f"model.window={self.window} and model.chunk={self.chunk}: expected one of them to be 0")
        if self.full_every and not (self.window or self.chunk):
            raise ValueError(
                f"model.full_every={self.full_every}: expected model.window or model.chunk for the other layers"
            )
        if self.full_every > self.layers:
            raise ValueError(f"model.full_every={self.full_every}: expected at most model.layers={self.layers}")
        if self.dim % self.heads or self.dim // self.heads % 2:
            raise ValueError(f"model.dim={self.dim}: expected an even multiple of model.heads={self.heads}")
        if self.latent and self.kv_heads != self.heads:
            raise ValueError(f"model.latent={self.latent} with model.kv_heads={self.kv_heads}: expected model.heads")
        if self.heads % self.kv_heads:
            raise ValueError(f"model.heads={self.heads}: expected a multiple of model.kv_heads={self.kv_heads}")
