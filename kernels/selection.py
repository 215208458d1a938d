"""Which implementation of attention runs: the names users give and what stands behind them."""

from __future__ import annotations

from functools import lru_cache

import torch

from flashcp.kernels.cpu import CpuAttention
from flashcp.kernels.interface import AttentionKernel
from flashcp.kernels.tuning import Tuning
from flashcp.kernels.varlen import NAMES, select_varlen
from flashcp.sharding.values import check_choice

ATTENTION = ("cpu", "triton", *NAMES)
_CPU = CpuAttention()


def attention_name(name: str, device: torch.device) -> str:
    """What `auto` stands for: `triton` on a GPU, `cpu` elsewhere. Raises ValueError as `select_attention` does, but for
    varlen kernels that are not installed: which one runs is found out where it runs, outside of compiled code."""
    check_choice("attention", name, ("auto", *ATTENTION))
    if name == "auto":
        name = "triton" if device.type == "cuda" else "cpu"
    if name == "cpu" and device.type != "cpu":
        raise ValueError(f"attention='cpu' on a {device.type} tensor: expected CPU tensors, or attention='triton'")
    if name == "triton" and device.type != "cuda":
        _check_interpreter(device)
    return name


def select_attention(name: str, device: torch.device, tuning: Tuning | None = None) -> AttentionKernel:
    """The implementation for a device. tuning: block shapes that replace the table's (`triton` alone has any).

    What `auto` selects on a GPU refuses masks, softcap and another head_dim of v, which never ran there. Raises
    ValueError for an unknown name, a device it does not run on, and `triton` on a CPU without the interpreter.
    """
    asked, name = name != "auto", attention_name(name, device)
    if name in NAMES:
        return select_varlen(name, device)
    return _CPU if name == "cpu" else _triton(tuning or Tuning(), asked)


def waits_inside(name: str) -> bool:
    """Whether an implementation can start before all rows are there: other people's kernels know no flags."""
    return name not in NAMES


@lru_cache(maxsize=8)
def _triton(tuning: Tuning, asked: bool) -> AttentionKernel:
    from flashcp.kernels.launch import TritonAttention

    return TritonAttention(tuning, asked)


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
