"""torch's own FlashAttention-2, the operator under `torch.nn.attention.varlen`.

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

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seqs: Sequences, scale: float) -> tuple[Tensor, Tensor]:
        *lengths, causal = seqs
        out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, causal, False, scale=scale)
        return out, lse.t().contiguous()

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seqs: Sequences, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        *lengths, causal = seqs
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout that there is not
        unused = torch.empty(0, device=q.device)
        tensors = grad_out, q, k, v, out, lse.t().contiguous()
        with deterministic():  # the operator asks this switch which of its two ways it goes
            return torch.ops.aten._flash_attention_backward(*tensors, *lengths, 0.0, causal, state, unused, scale=scale)
