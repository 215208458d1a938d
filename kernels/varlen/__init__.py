"""A door for other people's kernels: every varlen attention kernel that can run under our plans and exchanges.

A kernel is one class in one file (see `base.py`), listed once in `KERNELS`. `attention="varlen"` takes the first that
runs on the device and has a backward, `attention="varlen:NAME"` insists. The order is that of other people's figures
on packed documents: FlashAttention-3 on Hopper, where it is the fastest of them; FlashAttention-4, which is there for
Blackwell too; torch's own FlashAttention-2, which is always there; cuDNN last, for the reasons that its file gives.
On one H100 we ran FlashAttention-3's forward, torch's FlashAttention-2 and cuDNN's forward, FlashAttention-4 nowhere;
`sdpa` is for CPUs, where all that is around a kernel is tested.
"""

from __future__ import annotations

from functools import cache

import torch

from flashcp.kernels.varlen.attention import VarlenAttention
from flashcp.kernels.varlen.base import VarlenKernel
from flashcp.kernels.varlen.cudnn import Cudnn
from flashcp.kernels.varlen.flash_attention_3 import FlashAttention3
from flashcp.kernels.varlen.flash_attention_4 import FlashAttention4
from flashcp.kernels.varlen.sdpa import Sdpa
from flashcp.kernels.varlen.torch_flash import TorchFlash

__all__ = ["KERNELS", "NAMES", "select_varlen"]

KERNELS: dict[str, VarlenKernel] = {
    kernel.name: kernel for kernel in (FlashAttention3(), FlashAttention4(), TorchFlash(), Cudnn(), Sdpa())
}
NAMES = ("varlen", *(f"varlen:{name}" for name in KERNELS))


def select_varlen(name: str, device: torch.device) -> VarlenAttention:
    """Attention by a name of NAMES. Raises ValueError where no such kernel is installed for the device."""
    installed = [kernel for kernel in KERNELS.values() if kernel.is_available(device)]
    wanted = name.removeprefix("varlen").removeprefix(":")
    found = [kernel for kernel in installed if wanted in ("", kernel.name)]
    if not found:
        there = ", ".join(["varlen", *(f"varlen:{kernel.name}" for kernel in installed)])
        legal = f"{there}, which are installed for it" if installed else f"{', '.join(KERNELS)} to be installed for it"
        raise ValueError(f"attention={name!r} on a {device.type} tensor: expected one of {legal}")
    return _attention(next((kernel for kernel in found if not kernel.no_backward()), found[0]).name)


@cache
def _attention(name: str) -> VarlenAttention:
    """One object a kernel: its tables outlive a call."""
    return VarlenAttention(KERNELS[name])
