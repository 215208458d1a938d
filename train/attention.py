"""The decoder's attention: the one layer that sees other ranks.

Shapes: T rank's tokens, R rows received, D model width, H query heads, K kv heads, E head_dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from flashcp.sharding.plan import ShardingPlan
from flashcp.train.model_config import ModelConfig


class AttentionHandle(Protocol):
    """Keys and values under way."""

    def attention(self, q: Tensor, *, softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
        """Queries [T, H, E] to outputs [T, H, E]."""
        ...


class GatherHandle(Protocol):
    """Rows under way."""

    def rows(self) -> Tensor:
        """Those of others that this rank's queries read, [R, ...]."""
        ...


class ContextParallelAttention(Protocol):
    """What the decoder needs of `flashcp.ContextParallel`."""

    def prefetch(
        self, k: Tensor, v: Tensor, plan: ShardingPlan, *, window: int | None = None, chunk: int | None = None
    ) -> AttentionHandle:
        """Send keys and values, both [T, K, E], to the ranks that read them."""
        ...

    def prefetch_gather(
        self, x: Tensor, plan: ShardingPlan, *, window: int | None = None, chunk: int | None = None
    ) -> GatherHandle:
        """Send rows of any kind to the ranks that read them."""
        ...

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, received_k: Tensor, received_v: Tensor, plan: ShardingPlan, *,
        window: int | None = None, chunk: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Queries [T, H, E] to outputs, over rows that are here."""
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


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): of a row only its latent and one rotated key, which
    all heads share, travel. Who receives them expands them to keys [R, H, 2 E] and values [R, H, E].

    L: the latent's width. Its parts are computed as published but for queries, which have no latent of their own.
    """

    def __init__(self, model: ModelConfig, cp: ContextParallelAttention, layer: int) -> None:
        super().__init__()
        self.cp, self.limits, self.softcap = cp, model.limits(layer), model.softcap or None
        self.sinks = nn.Parameter(torch.zeros(model.heads)) if model.sinks else None
        self.head_dim, self.latent = model.dim // model.heads, model.latent
        self.wq = nn.Linear(model.dim, 2 * model.dim, bias=False)
        self.wkv = nn.Linear(model.dim, model.latent + self.head_dim, bias=False)
        self.latent_norm = nn.RMSNorm(model.latent, eps=model.norm_eps)
        self.wk = nn.Linear(model.latent, model.dim, bias=False)
        self.wv = nn.Linear(model.latent, model.dim, bias=False)
        self.wo = nn.Linear(model.dim, model.dim, bias=False)

    def forward(self, x_TD: Tensor, rotary: tuple[Tensor, Tensor], plan: ShardingPlan) -> Tensor:
        latent_TL, turned_TE = self.wkv(x_TD).split([self.latent, self.head_dim], dim=-1)
        turned_TE = rotate(turned_TE[:, None], rotary)[:, 0]
        row = torch.cat((self.latent_norm(latent_TL).type_as(turned_TE), turned_TE), dim=-1)
        sent = self.cp.prefetch_gather(row, plan, **self.limits)
        q_THE, turned_THE = self.wq(x_TD).unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)
        q = torch.cat((q_THE, rotate(turned_THE, rotary)), dim=-1)
        k, v = self.expand(row)
        received_k, received_v = self.expand(sent.rows())
        out_THE = self.cp.attend(
            q, k, v, received_k, received_v, plan, **self.limits, softcap=self.softcap, sinks=self.sinks
        )
        return self.wo(out_THE.flatten(1))

    def expand(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [R, H, 2 E] and values [R, H, E] of rows [R, L + E]."""
        latent, turned = row.split([self.latent, self.head_dim], dim=-1)
        k, v = (weight(latent).unflatten(-1, (-1, self.head_dim)) for weight in (self.wk, self.wv))
        return torch.cat((k, turned[:, None].expand_as(k)), dim=-1), v
