"""A varlen kernel for the CPU: a loop over torch's own tiled operator, one sequence at a time, in fp32."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from flashcp.kernels.cpu import by_kv_head, shared, to_rows
from flashcp.kernels.cpu_operator import attend_on_cpu, gradients_on_cpu
from flashcp.kernels.varlen.base import Sequences, VarlenKernel


class Sdpa(VarlenKernel):
    """See the module."""

    name = "sdpa"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    head_dim_multiple = 1
    longest_head_dim = 2**20  # the operator knows no limit
    alignment_bytes = 1

    def is_available(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seqs: Sequences, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
        group = q.shape[1] // k.shape[1]
        for queries, keys in _slices(seqs):
            inputs = by_kv_head(q[queries], group), shared(k[keys], group), shared(v[keys], group)
            part, part_lse = attend_on_cpu(*inputs, seqs.causal, scale)
            out[queries], lse[queries] = to_rows(part), to_rows(part_lse)
        return out, lse

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seqs: Sequences, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
        group = q.shape[1] // k.shape[1]
        for queries, keys in _slices(seqs):
            grad_part, q_part, out_part = (by_kv_head(x[queries], group) for x in (grad_out, q, out))
            lse_part = rearrange(lse[queries], "t (k g) -> g k t", g=group)
            inputs = grad_part, q_part, shared(k[keys], group), shared(v[keys], group), out_part, lse_part
            of_q, *of_kv = gradients_on_cpu(*inputs, seqs.causal, scale)
            grad_k[keys], grad_v[keys] = (rearrange(x.sum(0), "k t d -> t k d") for x in of_kv)
            grad_q[queries] = to_rows(of_q)
        return grad_q, grad_k, grad_v


def _slices(seqs: Sequences) -> Iterator[tuple[slice, slice]]:
    """The query rows and the key rows of each sequence."""
    query, key = seqs.cu_seqlens_q.tolist(), seqs.cu_seqlens_k.tolist()
    for i in range(len(query) - 1):
        yield slice(query[i], query[i + 1]), slice(key[i], key[i + 1])
