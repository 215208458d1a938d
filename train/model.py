"""A Llama-style decoder over one rank's rows of a pack: attention is the only layer that sees other ranks.

Shapes: T rank's tokens, D model width, H query heads, K kv heads, E head_dim, F feed-forward width,
V vocabulary. There is no batch dimension: a pack is one row of documents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flashcp.sharding.plan import ShardingPlan
from flashcp.train.attention import Attention, ContextParallelAttention, LatentAttention, Rotary
from flashcp.train.data.windows import NO_LABEL
from flashcp.train.model_config import ModelConfig

INIT_STD = 0.02


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(model.dim, model.ffn_width, bias=False)
        self.up = nn.Linear(model.dim, model.ffn_width, bias=False)
        self.down = nn.Linear(model.ffn_width, model.dim, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_TD)) * self.up(x_TD))


class Block(nn.Module):
    """Attention and feed-forward, each added to the stream after an RMS norm of its input."""

    def __init__(self, model: ModelConfig, cp: ContextParallelAttention, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(model.dim, eps=model.norm_eps)
        self.attention = (LatentAttention if model.latent else Attention)(model, cp, layer)
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
        self.checkpoint_activations, self.loss_rows = model.checkpoint_activations, model.loss_rows
        self.embedding = nn.Embedding(model.vocab_size, model.dim)
        self.rotary = Rotary(model.dim // model.heads, model.rope_theta)
        self.blocks = nn.ModuleList(Block(model, cp, layer) for layer in range(model.layers))
        self.norm = nn.RMSNorm(model.dim, eps=model.norm_eps)
        self.output = nn.Linear(model.dim, model.vocab_size, bias=False)
        if model.tied_embeddings:
            self.output.weight = self.embedding.weight
        self._draw_weights(seed)

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        plan: ShardingPlan,
        labels: Tensor | None = None,
        reduction: str = "sum",
    ) -> Tensor:
        """Logits [T, V] of this rank's tokens [T], at positions [T] inside their documents; given labels [T], the sum
        of their cross entropies instead, or with reduction="none" each of them [T]."""
        rotary = self.rotary(position_ids)
        x_TD = self.embedding(tokens)
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x_TD = checkpoint(block, x_TD, rotary, plan, use_reentrant=False)
            else:
                x_TD = block(x_TD, rotary, plan)
        x_TD = self.norm(x_TD)
        return self.output(x_TD) if labels is None else self._cross_entropy(x_TD, labels, reduction)

    def loss(self, tokens: Tensor, labels: Tensor, position_ids: Tensor, plan: ShardingPlan) -> Tensor:
        """Cross entropy summed (not averaged) over this rank's labelled tokens, fp32 scalar. With `loss_rows` no more
        rows of logits exist at a time: the backward computes them again, part by part."""
        return self(tokens, position_ids, plan, labels)  # not around `forward`, where FSDP gathers weights

    def _cross_entropy(self, x_TD: Tensor, labels: Tensor, reduction: str) -> Tensor:
        def of_rows(x: Tensor, some: Tensor) -> Tensor:
            return F.cross_entropy(self.output(x).float(), some, ignore_index=NO_LABEL, reduction=reduction)

        if not self.loss_rows:
            return of_rows(x_TD, labels)
        parts = zip(x_TD.split(self.loss_rows), labels.split(self.loss_rows), strict=True)
        losses = [checkpoint(of_rows, *part, use_reentrant=False) for part in parts]
        return torch.stack(losses).sum() if reduction == "sum" else torch.cat(losses)

    @torch.no_grad()
    def _draw_weights(self, seed: int) -> None:
        """Normal, std 0.02; projections that end in the residual stream by sqrt(2 layers) less (GPT-2)."""
        draw = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.ndim > 1 and not weight.is_meta:
                into_stream = name.endswith(("wo.weight", "down.weight"))
                std = INIT_STD / (2 * len(self.blocks)) ** 0.5 if into_stream else INIT_STD
                weight.normal_(0.0, std, generator=draw)
