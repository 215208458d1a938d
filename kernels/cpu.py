"""Attention on a CPU by torch's own tiled operator, reading each query shard's KV ranges where they lie.

No tokens x tokens matrix is ever made. Inputs are widened to fp32 range by range; partial outputs of the ranges are
merged in fp32 by their log-sum-exp, so the result does not depend on how finely a document is cut.

Shapes: T local rows, R received rows, H query heads, K KV heads, G = H / K query heads a KV head, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from flashcp.kernels.arrivals import Arrivals
from flashcp.kernels.schedule import Schedule

__all__ = ["KV", "Gradients", "attend", "attend_on_cpu", "forward", "gradients", "merge"]

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class KV(NamedTuple):
    """Keys and values of one buffer, or their gradients: [rows, K, D] each."""

    k: Tensor
    v: Tensor


class Gradients(NamedTuple):
    """Gradients of all inputs of attention: of q [T, H, D], of the local keys and values, of the receive buffer
    [R, 2, K, D] in fp32, for they are added elsewhere."""

    q: Tensor
    local: KV
    received: Tensor


def attend(
    q: Tensor, local: KV, received: KV, schedule: Schedule, scale: float, arrivals: Arrivals | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over all of a schedule's ranges at once: out [T, H, D] in q's dtype, log-sum-exp fp32 [T, H].

    Rows that read nothing get zeros and -inf. arrivals: received rows are still on their way; local ranges are
    computed first, and a received one when its source's flag is up.
    """
    out = q.new_zeros(q.shape, dtype=torch.float32)
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    if arrivals is None:
        forward(q, local, received, schedule, scale, out, lse)
    else:
        forward(q, local, received, schedule.part(~schedule.received), scale, out, lse)
        for source in np.unique(schedule.source[schedule.received]).tolist():
            arrivals.wait(source)
            part = schedule.part(schedule.received & (schedule.source == source))
            forward(q, local, received, part, scale, out, lse)
    return out.to(q.dtype), lse


def gradients(
    grad_out: Tensor,
    q: Tensor,
    local: KV,
    received: KV,
    out: Tensor,
    lse: Tensor,
    schedule: Schedule,
    scale: float,
    local_dtype: torch.dtype | None = None,
    leave: Callable[[Tensor], None] | None = None,
) -> Gradients:
    """Gradients of `attend`: q's in its dtype, local ones in local_dtype (None: the inputs').

    leave: called with the gradients of the receive buffer, fp32 [R, 2, K, D], as soon as they are complete.
    """
    grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (q, *local))
    back = q.new_zeros((len(received.k), 2, *received.k.shape[1:]), dtype=torch.float32)
    totals = KV(grad_k, grad_v), KV(*back.unbind(1))
    for in_received in (True, False):
        _add_gradients(grad_out, q, (local, received)[in_received], out, lse, schedule, scale, grad_q,
                       totals[in_received], in_received)  # fmt: skip
        if in_received and leave is not None:
            leave(back)
    dtype = local_dtype or local.k.dtype
    return Gradients(grad_q.to(q.dtype), KV(grad_k.to(dtype), grad_v.to(dtype)), back)


def forward(q: Tensor, local: KV, received: KV, schedule: Schedule, scale: float, out: Tensor, lse: Tensor) -> None:
    """Merge into `out` and `lse` what the schedule's ranges contribute.

    q: [T, H, D]. out: fp32 [T, H, D], zeros before the first part. lse: fp32 [T, H], -inf before the first part.
    A row whose ranges are all empty keeps zeros and -inf.
    """
    buffers = _by_head(local), _by_head(received)
    group = q.shape[1] // local.k.shape[1]
    for rows, ranges in _queries(schedule):
        q_part = _heads(q[rows], group)
        for in_received, keys, masked in ranges:
            k_part, v_part = (_shared(x[:, keys], group) for x in buffers[in_received])
            part, part_lse = attend_on_cpu(q_part, k_part, v_part, masked, scale)
            merge(out[rows], lse[rows], _rows(part), _rows(part_lse))


def attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """torch's operator on fp32 [G, K, t, D], and log-sum-exp [G, K, t]: what is no number in q stays none.

    The operator gives zeros for a query row of NaN or infinity, as if nothing were wrong with it.
    """
    out, lse = _attend(q, k, v, 0.0, causal, scale=scale)
    nothing = 0.0 * q.sum(-1)  # NaN for such a row
    return out + nothing[..., None], lse + nothing


def _add_gradients(
    grad_out: Tensor,
    q: Tensor,
    keys: KV,
    out: Tensor,
    lse: Tensor,
    schedule: Schedule,
    scale: float,
    grad_q: Tensor,
    grad_keys: KV,
    in_received: bool,
) -> None:
    """Add the gradients of the ranges in one of the two buffers to grad_q [T, H, D] and grad_keys, all fp32.

    out, lse: the merged result over *all* ranges of the forward pass; with it each range's gradient stands alone.
    """
    buffer = _by_head(keys)
    group = q.shape[1] // keys.k.shape[1]
    for rows, ranges in _queries(schedule):
        chosen = [(place, masked) for part, place, masked in ranges if part == in_received]
        if not chosen:
            continue
        q_part, out_part, grad_part = (_heads(x[rows], group) for x in (q, out, grad_out))
        lse_part = rearrange(lse[rows], "t (k g) -> g k t", g=group)
        for place, masked in chosen:
            k_part, v_part = (_shared(x[:, place], group) for x in buffer)
            grads = _attend_backward(grad_part, q_part, k_part, v_part, out_part, lse_part, 0.0, masked, scale=scale)
            grad_q[rows] += _rows(grads[0])
            for total, grad in zip(grad_keys, grads[1:], strict=True):
                total[place] += rearrange(grad.sum(0), "k t d -> t k d")


def _queries(schedule: Schedule) -> Iterator[tuple[slice, list[tuple[bool, slice, bool]]]]:
    """Per query shard its rows and its ranges, as slices: (rows, [(in received?, rows there, masked?), ...])."""
    first = schedule.range_first.tolist()
    ranges = list(
        zip(
            schedule.received.tolist(),
            map(slice, schedule.row_start.tolist(), schedule.row_stop.tolist()),
            schedule.masked.tolist(),
            strict=True,
        )
    )
    rows = map(slice, schedule.query_start.tolist(), schedule.query_stop.tolist())
    for i, query in enumerate(rows):
        yield query, ranges[first[i] : first[i + 1]]


def _by_head(buffer: KV) -> KV:
    return KV(*(rearrange(x, "t k d -> k t d") for x in buffer))


def _heads(x: Tensor, group: int) -> Tensor:
    """[t, H, D] -> fp32 [G, K, t, D]: the query heads of a KV head become the batch."""
    return rearrange(x, "t (k g) d -> g k t d", g=group).float()


def _shared(x: Tensor, group: int) -> Tensor:
    """[K, t, D] -> fp32 [G, K, t, D], one copy of the rows seen by the whole group."""
    return x.float().expand(group, *x.shape)


def _rows(x: Tensor) -> Tensor:
    """[G, K, t, ...] -> [t, H, ...]."""
    return rearrange(x, "g k t ... -> t (k g) ...")


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge attention of the same rows over further keys, part and part_lse, into fp32 out and lse."""
    merged = torch.logaddexp(lse, part_lse)
    out.mul_(torch.exp(lse - merged)[..., None]).add_(part * torch.exp(part_lse - merged)[..., None])
    lse.copy_(merged)
