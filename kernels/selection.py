"""Which implementation of attention runs: the names users give and the modules behind them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from flashcp.kernels import cpu
from flashcp.kernels.cpu import KV
from flashcp.kernels.schedule import Schedule

__all__ = ["ATTENTION", "AttentionKernel", "select_attention"]


class AttentionKernel(Protocol):
    """An implementation: a module with these two functions, documented in `kernels/cpu.py`."""

    def forward(
        self, q: Tensor, local: KV, received: KV, schedule: Schedule, scale: float, out: Tensor, lse: Tensor
    ) -> None:
        """Merge what the schedule's ranges contribute into out and lse."""

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        local: KV,
        received: KV,
        out: Tensor,
        lse: Tensor,
        schedule: Schedule,
        scale: float,
        grad_q: Tensor,
        grad_local: KV,
        grad_received: KV,
    ) -> None:
        """Add the gradients of the schedule's ranges."""


ATTENTION: dict[str, AttentionKernel] = {"cpu": cpu}


def select_attention(name: str, device: torch.device) -> AttentionKernel:
    """The implementation for a device. Raises ValueError for an unknown name or a device it does not run on."""
    if name not in ("auto", *ATTENTION):
        raise ValueError(f"attention={name!r}: expected one of auto, {', '.join(ATTENTION)}")
    if device.type != "cpu":
        raise ValueError(f"attention={name!r} on a {device.type} tensor: expected CPU tensors")
    return ATTENTION["cpu"]
