"""FlashAttention-3 for Hopper (Dao-AILab/flash-attention, folder hopper/).

The backward, windows and softcap were never run. The operators that `hopper/flash_api.cpp` registers, by names of
arguments: module `flash_attn_interface` registers them as flash_attn_3, the wheel fa3-fwd 0.0.3 (module
`fa3_fwd_interface`: no backward, no fp16) as fa3_fwd. Log-sum-exp: [H, Q] both ways.
"""

from __future__ import annotations

import importlib
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flashcp.kernels.varlen.base import Sequences, VarlenKernel, capability

_MODULES = {"flash_attn_interface": "flash_attn_3", "fa3_fwd_interface": "fa3_fwd"}


class FlashAttention3(VarlenKernel):
    """See the module."""

    name = "flash_attention_3"

    @cached_property
    def operators(self) -> Any:
        """`torch.ops.flash_attn_3` or `torch.ops.fa3_fwd`; None where neither is installed."""
        for module, namespace in _MODULES.items():
            try:
                importlib.import_module(module)
            except (ImportError, OSError):  # OSError: of a library that it wants
                continue
            return getattr(torch.ops, namespace)
        return None

    @property
    def forward_only(self) -> bool:
        """Whether what is installed is the wheel without a backward."""
        return self.operators is torch.ops.fa3_fwd

    def no_backward(self) -> str:
        return "fa3-fwd computes no gradients, flash_attn_interface does" if self.forward_only else ""

    def is_available(self, device: torch.device) -> bool:
        """Compute capability 9.0 alone."""
        return capability(device) == 90 and self.operators is not None

    def check(self, q: Tensor) -> None:
        super().check(q)
        if self.forward_only and q.dtype is not torch.bfloat16:
            raise ValueError(f"q is {q.dtype}: fa3-fwd, behind attention='varlen:{self.name}', expects torch.bfloat16")

    def has_windows(self) -> bool:
        return True

    def has_softcap(self) -> bool:
        return True

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, seqs: Sequences, scale: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """num_splits=1: the keys of a row are never split, whose merge would depend on the batch."""
        out, lse, *_ = self.operators.fwd(q, k, v, **_options(seqs, scale, softcap), num_splits=1)
        return out, lse.t().contiguous()

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seqs: Sequences,
        scale: float, softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        gradients = tuple(x.new_empty(x.shape) for x in (q, k, v))
        tensors = *(x.contiguous() for x in (grad_out, q, k, v, out, lse.t())), *gradients
        self.operators.bwd(*tensors, **_options(seqs, scale, softcap), deterministic=True)
        return gradients  # type: ignore[return-value]


def _options(seqs: Sequences, scale: float, softcap: float) -> dict[str, Any]:
    *lengths, causal, left = seqs
    options = {"is_causal": causal, "window_size_left": left, "softmax_scale": scale, "softcap": softcap}
    return {**dict(zip(Sequences._fields, lengths, strict=False)), **options}
