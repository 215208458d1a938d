"""A Llama-style decoder over one rank's rows of a pack: attention is the only layer that sees other ranks.

Shapes: T rank's tokens, D model width, H query heads, K kv heads, E head_dim, F feed-forward width,
V vocabulary. There is no batch dimension: a pack is one row of documents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flashcp.limits import Count, Limit, Natural, Rows
from flashcp.schema import read_dataclass
from flashcp.sharding.mask import Mask
from flashcp.sharding.plan import ShardingPlan
from flashcp.train.data.windows import NO_LABEL

INIT_STD = 0.02
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
        if self.dim % self.heads or self.dim // self.heads % 2:
            raise ValueError(f"model.dim={self.dim}: expected an even multiple of model.heads={self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"model.heads={self.heads}: expected a multiple of model.kv_heads={self.kv_heads}")


class AttentionHandle(Protocol):
    """Keys and values under way."""

    def attention(self, q: Tensor, *, softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
        """Queries [T, H, E] to outputs [T, H, E]."""
        ...


class ContextParallelAttention(Protocol):
    """What the decoder needs of `flashcp.ContextParallel`."""

    def prefetch(
        self, k: Tensor, v: Tensor, plan: ShardingPlan, *, window: int | None = None, chunk: int | None = None
    ) -> AttentionHandle:
        """Send keys and values, both [T, K, E], to the ranks that read them."""
        ...


class Rotary(nn.Module):
    """Rotary position embedding, pairs (i, i + E/2), computed in fp32 (RoFormer, arXiv 2104.09864)."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        exponent_e = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self.frequency: Tensor
        self.register_buffer("frequency", theta**-exponent_e, persistent=False)  # [E/2]

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, 1, E/2] of positions [T]."""
        angle_T1e = position_ids[:, None, None].float() * self.frequency
        return angle_T1e.cos(), angle_T1e.sin()


def rotate(x_THE: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys [T, H, E] turned by their positions."""
    cos, sin = rotary
    first, second = x_THE.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x_THE)


class Attention(nn.Module):
    """Grouped-query attention. Keys and values leave before the queries are computed."""

    def __init__(self, model: ModelConfig, cp: ContextParallelAttention, layer: int) -> None:
        super().__init__()
        self.cp, self.limits, self.softcap = cp, model.limits(layer), model.softcap or None
        self.sinks = nn.Parameter(torch.zeros(model.heads)) if model.sinks else None
        self.head_dim = model.dim // model.heads
        kv_dim = model.kv_heads * self.head_dim
        self.wq = nn.Linear(model.dim, model.dim, bias=False)
        self.wk = nn.Linear(model.dim, kv_dim, bias=False)
        self.wv = nn.Linear(model.dim, kv_dim, bias=False)
        self.wo = nn.Linear(model.dim, model.dim, bias=False)

    def forward(self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], plan: ShardingPlan) -> Tensor:
        k_TKE = rotate(self.wk(x_TD).unflatten(-1, (-1, self.head_dim)), rotary)
        v_TKE = self.wv(x_TD).unflatten(-1, (-1, self.head_dim))
        sent = self.cp.prefetch(k_TKE, v_TKE, plan, **self.limits)
        q_THE = rotate(self.wq(x_TD).unflatten(-1, (-1, self.head_dim)), rotary)
        return self.wo(sent.attention(q_THE, softcap=self.softcap, sinks=self.sinks).flatten(1))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        width = model.ffn_dim or -(-8 * model.dim // 3 // 64) * 64
        self.gate = nn.Linear(model.dim, width, bias=False)
        self.up = nn.Linear(model.dim, width, bias=False)
        self.down = nn.Linear(width, model.dim, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_TD)) * self.up(x_TD))


class Block(nn.Module):
    """Attention and feed-forward, each added to the stream after an RMS norm of its input."""

    def __init__(self, model: ModelConfig, cp: ContextParallelAttention, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(model.dim, eps=model.norm_eps)
        self.attention = Attention(model, cp, layer)
        self.feed_forward_norm = nn.RMSNorm(model.dim, eps=model.norm_eps)
        self.feed_forward = FeedForward(model)

    def forward(self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], plan: ShardingPlan) -> Tensor:
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), rotary, plan)
        return x_TD + self.feed_forward(self.feed_forward_norm(x_TD))


class Decoder(nn.Module):
    """The model. A seed gives the same weights on every rank and device: they are drawn on the CPU."""

    def __init__(self, model: ModelConfig, cp: ContextParallelAttention, seed: int = 0) -> None:
        super().__init__()
        model.check()
        self.checkpoint_activations = model.checkpoint_activations
        self.embedding = nn.Embedding(model.vocab_size, model.dim)
        self.rotary = Rotary(model.dim // model.heads, model.rope_theta)
        self.blocks = nn.ModuleList(Block(model, cp, layer) for layer in range(model.layers))
        self.norm = nn.RMSNorm(model.dim, eps=model.norm_eps)
        self.output = nn.Linear(model.dim, model.vocab_size, bias=False)
        if model.tied_embeddings:
            self.output.weight = self.embedding.weight
        self._draw_weights(seed)

    def forward(self, tokens: Tensor, position_ids: Tensor, plan: ShardingPlan) -> Tensor:
        """Logits [T, V] of this rank's tokens [T], at positions [T] inside their documents."""
        rotary = self.rotary(position_ids)
        x_TD = self.embedding(tokens)
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x_TD = checkpoint(block, x_TD, rotary, plan, use_reentrant=False)
            else:
                x_TD = block(x_TD, rotary, plan)
        return self.output(self.norm(x_TD))

    def loss(self, tokens: Tensor, labels: Tensor, position_ids: Tensor, plan: ShardingPlan) -> Tensor:
        """Cross entropy summed (not averaged) over this rank's labelled tokens, fp32 scalar."""
        logits_TV = self(tokens, position_ids, plan)
        return F.cross_entropy(logits_TV.float(), labels, ignore_index=NO_LABEL, reduction="sum")

    @torch.no_grad()
    def _draw_weights(self, seed: int) -> None:
        """Normal, std 0.02; projections that end in the residual stream by sqrt(2 layers) less (GPT-2)."""
        draw = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.ndim > 1:
                into_stream = name.endswith(("wo.weight", "down.weight"))
                std = INIT_STD / (2 * len(self.blocks)) ** 0.5 if into_stream else INIT_STD
                weight.normal_(0.0, std, generator=draw)
