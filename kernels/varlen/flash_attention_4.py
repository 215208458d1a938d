"""FlashAttention-4 for Hopper and Blackwell (package flash-attn-4). Written, never run on a GPU.

The functions under `flash_attn_varlen_func` of `flash_attn/cute/interface.py`, by argument names: those of 4.0.0b36 and
of Dao-AILab/flash-attention at 0251105a. Log-sum-exp: [H, Q] both ways.
"""

from __future__ import annotations

import importlib
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flashcp.kernels.varlen.base import Sequences, VarlenKernel, capability


class FlashAttention4(VarlenKernel):
    """See the module."""

    name = "flash_attention_4"
    longest_head_dim = 128  # beyond it what is there differs from chip to chip

    @cached_property
    def interface(self) -> Any:
        """The module; None where it is not installed."""
        try:
            return importlib.import_module("flash_attn.cute.interface")
        except (ImportError, OSError):  # OSError: of a library that it wants
            return None

    def is_available(self, device: torch.device) -> bool:
        """Compute capability 9.0 to 11.x: its backward is deterministic on these."""
        return 90 <= capability(device) < 120 and self.interface is not None

    def has_windows(self) -> bool:
        return True

    def has_softcap(self) -> bool:
        """Earlier backwards take a softcap and leave it out in silence."""
        return hasattr(self.interface.utils, "create_softcap_scoremod_bwd")

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, seqs: Sequences, scale: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        options = _options(seqs, scale, softcap)
        out, lse, *_ = self.interface._flash_attn_fwd(q, k, v, **options, return_lse=True)
        return out, lse.t().contiguous()

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seqs: Sequences,
        scale: float, softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        options = _options(seqs, scale, softcap)
        tensors = q, k, v, out, grad_out, lse.t().contiguous()
        return self.interface._flash_attn_bwd(*tensors, **options, deterministic=True)


def _options(seqs: Sequences, scale: float, softcap: float) -> dict[str, Any]:
    *lengths, causal, left = seqs
    window = {"causal": causal, "window_size_left": None if left < 0 else left}
    scores = {"softmax_scale": scale, "softcap": softcap}
    return {**dict(zip(Sequences._fields, lengths, strict=False)), **window, **scores}
