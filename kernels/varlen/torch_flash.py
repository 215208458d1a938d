"""torch's own FlashAttention-2, the operator under `torch.nn.attention.varlen`. Windows were never run.

Log-sum-exp: [H, Q] both ways, as torch's own fake function of it says (`torch/nn/attention/varlen.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashcp.kernels.varlen.base import Sequences, VarlenKernel, capability, deterministic


class TorchFlash(VarlenKernel):
    """See the module."""

    name = "torch_flash"

    def is_available(self, device: torch.device) -> bool:
        """Compute capability 8.0 or later, and a torch that was built with it."""
        return capability(device) >= 80 and torch.backends.cuda.is_flash_attention_available()

    def has_windows(self) -> bool:
        return True

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, seqs: Sequences, scale: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        *lengths, causal, left = seqs
        options = {"scale": scale, "window_size_left": left}
        out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, causal, False, **options)
        return out, lse.t().contiguous()

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seqs: Sequences,
        scale: float, softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        *lengths, causal, left = seqs
        options = {"scale": scale, "window_size_left": left}
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout that there is not
        unused = torch.empty(0, device=q.device)
        tensors = grad_out, q, k, v, out, lse.t().contiguous()
        with deterministic():  # the operator asks this switch which of its two ways it goes
            return torch.ops.aten._flash_attention_backward(*tensors, *lengths, 0.0, causal, state, unused, **options)
