"""AdamW with warm-up and cosine decay; gradients in one flat buffer, summed over ranks and clipped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.distributed as dist
from torch import nn

from flashcp.limits import FINITE, Limit, Natural, NonNegative, Positive

Beta = Annotated[float, FINITE, Limit(lambda value: 0 <= value < 1, "a number >= 0 and < 1")]


@dataclass
class OptimizerConfig:
    """AdamW (arXiv 1711.05101). clip_norm: 0 leaves gradients as they are. min_lr_ratio: last rate / peak."""

    lr: Positive = 3e-4
    min_lr_ratio: Annotated[float, FINITE, Limit(lambda value: 0 <= value <= 1, "0 to 1")] = 0.1
    warmup_steps: Natural = 10
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    clip_norm: NonNegative = 1.0


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Rate of step 1..steps: linear up to the peak at `warmup_steps`, half a cosine down to the last step."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    low = config.lr * config.min_lr_ratio
    return low + (config.lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices, none on norms. Parameters and state are fp32."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=matrices[0].is_cuda,
    )


class FlatGradients:
    """Every parameter's gradient as a view of one fp32 buffer: one collective sums them all.

    Each rank's gradient is that of its own rows' share of the global loss: the sum over ranks, not the mean,
    is the gradient of the loss.
    """

    def __init__(self, model: nn.Module) -> None:
        weights = list(model.parameters())
        self._buffer = torch.zeros(sum(w.numel() for w in weights), device=weights[0].device)
        for weight, view in zip(weights, self._buffer.split([w.numel() for w in weights]), strict=True):
            weight.grad = view.view_as(weight)

    def zero(self) -> None:
        """Set every gradient to zero, in place."""
        self._buffer.zero_()

    def sum_over_ranks(self) -> None:
        """Add the gradients of all ranks, in fp32. Alone: nothing to do."""
        if dist.is_initialized():
            dist.all_reduce(self._buffer)

    def norm(self) -> float:
        """Of all of them together; waits for the device."""
        return torch.linalg.vector_norm(self._buffer).item()

    def clip(self, norm: float, max_norm: float) -> None:
        """Scale from their norm to one of at most `max_norm` (0: leave)."""
        if max_norm and (scale := max_norm / (norm + 1e-6)) < 1:
            self._buffer.mul_(scale)
