"""A varlen kernel for the CPU: a loop over torch's own tiled operator, one sequence at a time, in fp32."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from flashcp.kernels.cpu import attend_on_cpu
from flashcp.kernels.varlen.base import Sequences, VarlenKernel

__all__ = ["Sdpa"]

_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Sdpa(VarlenKernel):
    """See the module."""

    name = "sdpa"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    head_dim_multiple = 1
    longest_head_dim = 2**20  # the operator knows no limit
    alignment_bytes = 1

    def is_available(self, device: torch.device) -> bool:
        """See VarlenKernel."""
        return device.type == "cpu"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float) -> tuple[Tensor, Tensor]:
        """See VarlenKernel."""
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
        group = q.shape[1] // k.shape[1]
        for queries, keys in _slices(sequences):
            inputs = _by_head(q[queries], group), _shared(k[keys], group), _shared(v[keys], group)
            part, part_lse = attend_on_cpu(*inputs, sequences.causal, scale)
            out[queries], lse[queries] = _rows(part), _rows(part_lse)
        return out, lse

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        sequences: Sequences,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See VarlenKernel."""
        grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
        group = q.shape[1] // k.shape[1]
        for queries, keys in _slices(sequences):
            grad_part, q_part, out_part = (_by_head(x[queries], group) for x in (grad_out, q, out))
            lse_part = rearrange(lse[queries], "t (k g) -> g k t", g=group)
            inputs = grad_part, q_part, _shared(k[keys], group), _shared(v[keys], group), out_part, lse_part
            dq, dk, dv = _attend_backward(*inputs, 0.0, sequences.causal, scale=scale)
            grad_q[queries] = _rows(dq)
            grad_k[keys], grad_v[keys] = (rearrange(x.sum(0), "k t d -> t k d") for x in (dk, dv))
        return grad_q, grad_k, grad_v


def _slices(sequences: Sequences) -> Iterator[tuple[slice, slice]]:
    """The query rows and the key rows of each sequence."""
    query, key = sequences.cu_seqlens_q.tolist(), sequences.cu_seqlens_k.tolist()
    for i in range(len(query) - 1):
        yield slice(query[i], query[i + 1]), slice(key[i], key[i + 1])


def _by_head(x: Tensor, group: int) -> Tensor:
    """[t, H, D] -> fp32 [G, K, t, D]: the query heads of a KV head become the batch."""
    return rearrange(x, "t (k g) d -> g k t d", g=group).float()


def _shared(x: Tensor, group: int) -> Tensor:
    """[t, K, D] -> fp32 [G, K, t, D], one copy of the rows seen by the whole group."""
    return rearrange(x, "t k d -> k t d").float().expand(group, -1, -1, -1)


def _rows(x: Tensor) -> Tensor:
    """[G, K, t, ...] -> [t, H, ...]."""
    return rearrange(x, "g k t ... -> t (k g) ...")
