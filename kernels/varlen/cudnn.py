"""cuDNN's attention by cumulative lengths, through torch's operator. The backward was never run.

torch finds a sequence at its first row x heads x head_dim, whatever the strides: tensors must be dense
(`aten/src/ATen/native/cudnn/MHA.cpp`). Until the summer of 2026 it built cuDNN's graph anew in every call
(pytorch/pytorch#191576), and its backward has no deterministic way that one could ask for: so this kernel comes last.
Log-sum-exp: [Q, H, 1] both ways.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashcp.kernels.varlen.base import Sequences, VarlenKernel, capability

# The backward of 2.11 takes head_dim for the longest length and writes past its buffers (pytorch/pytorch#186142, mended
# in June 2026). Which release has that first was not checked on a GPU: 2.14 was branched later for certain.
_FIRST_WITH_BACKWARD = (2, 14)


class Cudnn(VarlenKernel):
    """See the module."""

    name = "cudnn"
    longest_head_dim = 128

    def no_backward(self) -> str:
        version = tuple(map(int, torch.__version__.split(".")[:2]))
        wanted = ".".join(map(str, _FIRST_WITH_BACKWARD))
        return "" if version >= _FIRST_WITH_BACKWARD else f"cuDNN's varlen backward needs torch >= {wanted}"

    def is_available(self, device: torch.device) -> bool:
        return capability(device) >= 80 and torch.backends.cudnn.is_available()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, seqs: Sequences, scale: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        *lengths, causal, _ = seqs
        dense = (x.contiguous() for x in (q, k, v))
        out, lse, *_ = torch.ops.aten._cudnn_attention_forward(
            *dense, None, *lengths, True, 0.0, causal, False, scale=scale
        )
        return out, lse.squeeze(-1)

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seqs: Sequences,
        scale: float, softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        *lengths, causal, _ = seqs
        seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of a dropout that there is not
        dense = (x.contiguous() for x in (grad_out, q, k, v, out, lse[..., None]))
        return torch.ops.aten._cudnn_attention_backward(*dense, seed, seed, None, *lengths, 0.0, causal, scale=scale)
