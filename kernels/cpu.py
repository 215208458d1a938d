"""Attention on a CPU by torch's own tiled operator, reading each query shard's KV ranges where they lie.

No tokens x tokens matrix is ever made. Inputs are widened to fp32 range by range; partial outputs of the ranges are
merged in fp32 by their log-sum-exp, so the result does not depend on how finely a document is cut.

Shapes: T local rows, R received rows, H query heads, K KV heads, G = H / K query heads a KV head, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from flashcp.kernels.interface import KV, AttentionKernel, Gradients, OnReceived, WaitFlags
from flashcp.kernels.schedule import Schedule

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class CpuAttention(AttentionKernel):
    """See the module."""

    def attend(
        self,
        q: Tensor,
        local: KV,
        received: KV,
        schedule: Schedule,
        scale: float,
        flags: WaitFlags | None = None,
        softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        out = q.new_zeros(q.shape, dtype=torch.float32)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        if flags is None:
            self.merge_into(out, lse, q, local, received, schedule, scale)
        else:
            self.merge_into(out, lse, q, local, received, schedule.part(~schedule.received), scale)
            for source in np.unique(schedule.source[schedule.received]).tolist():
                flags.wait(source)
                part = schedule.part(schedule.received & (schedule.source == source))
                self.merge_into(out, lse, q, local, received, part, scale)
        return out.to(q.dtype), lse

    def merge_into(
        self,
        out: Tensor,
        lse: Tensor,
        q: Tensor,
        local: KV,
        received: KV,
        schedule: Schedule,
        scale: float,
        softcap: float = 0.0,
    ) -> None:
        group = q.shape[1] // local.k.shape[1]
        for rows, ranges in _queries(schedule):
            q_part = by_kv_head(q[rows], group)
            for in_received, keys, masked in ranges:
                k_part, v_part = (shared(x[keys], group) for x in (received if in_received else local))
                part, part_lse = attend_on_cpu(q_part, k_part, v_part, masked, scale)
                merge(out[rows], lse[rows], to_rows(part), to_rows(part_lse))

    def gradients(
        self,
        grad_out: Tensor,
        q: Tensor,
        local: KV,
        received: KV,
        out: Tensor,
        lse: Tensor,
        schedule: Schedule,
        scale: float,
        local_dtype: torch.dtype | None = None,
        on_received: OnReceived | None = None,
        received_dtype: torch.dtype = torch.float32,
        softcap: float = 0.0,
    ) -> Gradients:
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (q, *local))
        grad_received = q.new_zeros((len(received.k), 2, *received.k.shape[1:]), dtype=torch.float32)
        leaving = grad_received.to(received_dtype)
        group = q.shape[1] // local.k.shape[1]

        def add_ranges(chosen: np.ndarray, keys: KV, grad_keys: KV) -> None:
            for rows, ranges in _queries(schedule.part(chosen)):
                if not ranges:
                    continue
                q_part, out_part, grad_part = (by_kv_head(x[rows], group) for x in (q, out, grad_out))
                lse_part = rearrange(lse[rows], "t (k g) -> g k t", g=group)
                for _, place, masked in ranges:
                    k_part, v_part = (shared(x[place], group) for x in keys)
                    tensors = grad_part, q_part, k_part, v_part, out_part, lse_part
                    part, *parts = gradients_on_cpu(*tensors, masked, scale)
                    grad_q[rows] += part
                    for total, part in zip(grad_keys, parts, strict=True):
                        total[place] += part

        for source in _nearest_first(schedule):
            chosen = schedule.received & (schedule.source == source)
            add_ranges(chosen, received, KV(*grad_received.unbind(1)))
            rows = slice(int(schedule.row_start[chosen].min()), int(schedule.row_stop[chosen].max()))
            leaving[rows] = grad_received[rows]
            if on_received is not None:
                on_received(leaving, source)
        if on_received is not None:
            on_received(leaving)
        add_ranges(~schedule.received, local, KV(grad_k, grad_v))
        dtype = local_dtype or local.k.dtype
        return Gradients(grad_q.to(q.dtype), KV(grad_k.to(dtype), grad_v.to(dtype)), leaving)


def attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """torch's operator on fp32 [G, K, t, D], and log-sum-exp [G, K, t]: what is no number in q stays none.

    The operator gives zeros for a query row of NaN or infinity, as if nothing were wrong with it.
    """
    out, lse = _attend(q, k, v, 0.0, causal, scale=scale)
    nothing = 0.0 * q.sum(-1)  # NaN for such a row
    return out + nothing[..., None], lse + nothing


def gradients_on_cpu(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend_on_cpu`, from fp32 [G, K, t, D] and lse [G, K, t], as rows: of q [t, H, D], k and v
    [t, K, D]."""
    grad_q, *grad_kv = _attend_backward(grad_out, q, k, v, out, lse, 0.0, causal, scale=scale)
    grad_k, grad_v = (rearrange(x.sum(0), "k t d -> t k d") for x in grad_kv)
    return to_rows(grad_q), grad_k, grad_v


def by_kv_head(x: Tensor, group: int) -> Tensor:
    """[t, H, D] -> fp32 [G, K, t, D]: the query heads of a KV head become the batch."""
    return rearrange(x, "t (k g) d -> g k t d", g=group).float()


def shared(x: Tensor, group: int) -> Tensor:
    """[t, K, D] -> fp32 [G, K, t, D], one copy of the rows seen by the whole group."""
    return x.transpose(0, 1).float().expand(group, -1, -1, -1)


def to_rows(x: Tensor) -> Tensor:
    """[G, K, t, ...] -> [t, H, ...]."""
    return rearrange(x, "g k t ... -> t (k g) ...")


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge attention of the same rows over further keys, part [t, H, D] and part_lse [t, H], into fp32 out and lse."""
    merged = torch.logaddexp(lse, part_lse)
    out.mul_(torch.exp(lse - merged)[..., None]).add_(part * torch.exp(part_lse - merged)[..., None])
    lse.copy_(merged)


def _nearest_first(schedule: Schedule) -> list[int]:
    """The sources, the rank before this one first and the next one last: no rank is everybody's first."""
    own = int(schedule.source[~schedule.received].max(initial=0))
    return sorted(schedule.sources, key=lambda source: (source > own, -source))


def _queries(schedule: Schedule) -> Iterator[tuple[slice, list[tuple[bool, slice, bool]]]]:
    """Per query shard its rows and its ranges, as slices: (rows, [(in received?, rows there, masked?), ...])."""
    if schedule.seen is not None:
        raise ValueError("attention='cpu' with masks: expected causal documents")
    first = schedule.range_first.tolist()
    places = map(slice, schedule.row_start.tolist(), schedule.row_stop.tolist())
    ranges = list(zip(schedule.received.tolist(), places, schedule.masked.tolist(), strict=True))
    rows = map(slice, schedule.query_start.tolist(), schedule.query_stop.tolist())
    for i, query in enumerate(rows):
        yield query, ranges[first[i] : first[i + 1]]
