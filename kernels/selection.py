"""Which implementation of attention runs: the names users give and what stands behind them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Protocol, cast

import torch
from torch import Tensor

from flashcp.kernels import cpu
from flashcp.kernels.arrivals import Arrivals
from flashcp.kernels.cpu import KV, Gradients
from flashcp.kernels.schedule import Schedule
from flashcp.kernels.tuning import Tuning
from flashcp.kernels.varlen import NAMES, select_varlen

__all__ = ["ATTENTION", "AttentionKernel", "attention_name", "select_attention", "waits_inside"]

ATTENTION = ("cpu", "triton", *NAMES)


class AttentionKernel(Protocol):
    """An implementation; what these do is documented in `kernels/cpu.py`.

    forward goes on from earlier parts, in fp32; attend and gradients take all ranges at once.
    """

    def forward(
        self, q: Tensor, local: KV, received: KV, schedule: Schedule, scale: float, out: Tensor, lse: Tensor
    ) -> None:
        """Merge what the schedule's ranges contribute into out and lse."""

    def attend(
        self,
        q: Tensor,
        local: KV,
        received: KV,
        schedule: Schedule,
        scale: float,
        arrivals: Arrivals | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Output in q's dtype and log-sum-exp. arrivals: received rows are waited for source by source."""

    def gradients(
        self,
        grad_out: Tensor,
        q: Tensor,
        local: KV,
        received: KV,
        out: Tensor,
        lse: Tensor,
        schedule: Schedule,
        scale: float,
        local_dtype: torch.dtype | None = None,
        leave: Callable[[Tensor], None] | None = None,
    ) -> Gradients:
        """Gradients of `attend`; those of received rows first."""


def attention_name(name: str, device: torch.device) -> str:
    """What `auto` stands for: `triton` on a GPU, `cpu` elsewhere. Raises ValueError as `select_attention` does, but for
    varlen kernels that are not installed: which one runs is found out where it runs, outside of compiled code."""
    if name not in ("auto", *ATTENTION):
        raise ValueError(f"attention={name!r}: expected one of auto, {', '.join(ATTENTION)}")
    if name == "auto":
        name = "triton" if device.type == "cuda" else "cpu"
    if name == "cpu" and device.type != "cpu":
        raise ValueError(f"attention='cpu' on a {device.type} tensor: expected CPU tensors, or attention='triton'")
    if name == "triton" and device.type != "cuda":
        _check_interpreter(device)
    return name


def select_attention(name: str, device: torch.device, tuning: Tuning | None = None) -> AttentionKernel:
    """The implementation for a device. tuning: block shapes that replace the table's (`triton` alone has any).

    Raises ValueError for an unknown name, a device it does not run on, and `triton` on a CPU without the interpreter.
    """
    name = attention_name(name, device)
    if name in NAMES:
        return select_varlen(name, device)
    return cast(AttentionKernel, cpu) if name == "cpu" else _triton(tuning or Tuning())


def waits_inside(name: str) -> bool:
    """Whether an implementation can start before all rows are there: other people's kernels know no flags."""
    return name not in NAMES


@lru_cache(maxsize=8)
def _triton(tuning: Tuning) -> AttentionKernel:
    from flashcp.kernels.launch import TritonAttention

    return TritonAttention(tuning)


def _check_interpreter(device: torch.device) -> None:
    try:
        import triton
    except ImportError as error:
        raise ValueError("attention='triton': expected triton to be installed; attention='cpu' needs none") from error
    if device.type != "cpu" or not triton.knobs.runtime.interpret:
        raise ValueError(
            f"attention='triton' on a {device.type} tensor: expected a GPU, or CPU tensors and Triton's interpreter, "
            "which is on when TRITON_INTERPRET=1 is set before Python starts"
        )
