"""A varlen kernel for the CPU: a loop over torch's own tiled operator, one sequence at a time, in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor

from flashcp.kernels.cpu import by_kv_head, shared, to_rows
from flashcp.kernels.cpu_operator import Visible, attend_on_cpu, gradients_on_cpu
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

    def has_windows(self) -> bool:
        return True

    def has_softcap(self) -> bool:
        return True

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, seqs: Sequences, scale: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
        group = q.shape[1] // k.shape[1]
        for queries, keys, mask in _parts(seqs, softcap > 0):
            inputs = by_kv_head(q[queries], group), shared(k[keys], group), shared(v[keys], group)
            part, part_lse = attend_on_cpu(*inputs, mask, scale, softcap)
            out[queries], lse[queries] = to_rows(part), to_rows(part_lse)
        return out, lse

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seqs: Sequences,
        scale: float, softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
        group = q.shape[1] // k.shape[1]
        for queries, keys, mask in _parts(seqs, softcap > 0):
            grad_part, q_part, out_part = (by_kv_head(x[queries], group) for x in (grad_out, q, out))
            lse_part = rearrange(lse[queries], "t (k g) -> g k t", g=group)
            inputs = grad_part, q_part, shared(k[keys], group), shared(v[keys], group), out_part, lse_part
            of_q, *of_kv = gradients_on_cpu(*inputs, mask, scale, softcap)
            grad_k[keys], grad_v[keys] = (rearrange(x.sum(0), "k t d -> t k d") for x in of_kv)
            grad_q[queries] = to_rows(of_q)
        return grad_q, grad_k, grad_v


def _parts(seqs: Sequences, capped: bool) -> Iterator[tuple[slice, slice, bool | Visible]]:
    """The query rows and the key rows of each sequence, and what the former see of the latter."""
    query, key = seqs.cu_seqlens_q.tolist(), seqs.cu_seqlens_k.tolist()
    for queries, keys in zip(pairwise(query), pairwise(key), strict=True):
        mask: bool | Visible = seqs.causal
        if seqs.left >= 0 or (seqs.causal and capped):
            past = keys[1] - keys[0]
            row = torch.arange(queries[0], queries[1]) - queries[1] + past
            lowest = row - seqs.left if seqs.left >= 0 else torch.zeros_like(row)
            mask = Visible.between(lowest, row + 1 if seqs.causal else torch.full_like(row, past), past)
        yield slice(*queries), slice(*keys), mask
