"""Checks of q, k and v where they enter, shared by every attention implementation."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from flashcp.sharding.values import shown

_LEAST, _MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
_COMPUTED = (torch.float32, torch.bfloat16, torch.float16)


def check_heads(q: Tensor, k: Tensor, v: Tensor, own_v_dim: bool = False) -> None:
    """Raises ValueError unless q is [tokens, query heads, head_dim] and k, v [tokens, KV heads, head_dim] of one
    floating dtype and device, query heads being a multiple of KV heads. own_v_dim: v's head_dim may be another one."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            raise ValueError(f"{name} is a {type(tensor).__name__}: expected a dense tensor [tokens, heads, head_dim]")
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 3:
        raise ValueError(f"{shapes}: expected [tokens, heads, head_dim] each")
    if k.shape[:2] != v.shape[:2] or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(f"{shapes}: expected equal tokens and head_dim, and k and v of as many heads")
    if not own_v_dim and k.shape[2] != v.shape[2]:
        raise ValueError(f"{shapes}: expected k and v of one head_dim")
    if min(*q.shape[1:], *k.shape[1:], v.shape[2]) < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}: expected query heads to be a multiple of KV heads")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}: expected one floating-point dtype")
    if not q.device == k.device == v.device:
        raise ValueError(f"q on {q.device}, k on {k.device}, v on {v.device}: expected one device")


def check_inputs(q: Tensor, k: Tensor, v: Tensor, rows: int | None = None, own_v_dim: bool = False) -> None:
    """What every fast implementation asks of its arguments: `check_heads`, `rows` rows if
    that is known, a dtype it computes in."""
    check_heads(q, k, v, own_v_dim)
    if rows is not None and len(q) != rows:
        raise ValueError(f"q has {len(q)} rows: expected {rows}, one for each token held here")
    if q.dtype not in _COMPUTED:
        raise ValueError(f"q is {q.dtype}: expected one of {', '.join(map(str, _COMPUTED))}")


def default_scale(q: Tensor, softmax_scale: float | None) -> float:
    """The factor on the scores: as given, or 1 / sqrt(head_dim). Raises ValueError unless positive, in fp32 too."""
    if softmax_scale is None:
        return 1.0 / math.sqrt(q.shape[-1])
    if not _is_positive(softmax_scale):
        raise ValueError(f"softmax_scale={shown(softmax_scale)}: expected a positive number (scores are fp32)")
    return float(softmax_scale)


def read_softcap(softcap: float | None) -> float:
    """The cap on the scores, 0.0 for none. Raises ValueError unless None, or positive, in fp32 too."""
    if softcap is None:
        return 0.0
    if not _is_positive(softcap):
        raise ValueError(f"softcap={shown(softcap)}: expected a positive number, or None (scores are fp32)")
    return float(softcap)


def _is_positive(number: object) -> bool:
    """In fp32, in which kernels compute: beyond its ends a number is 0 or infinity there, and scores are NaN."""
    whole_or_real = isinstance(number, Real) and not isinstance(number, bool)
    return whole_or_real and _LEAST <= number <= _MOST  # type: ignore[operator]


def check_return_lse(return_lse: bool) -> None:
    """Raises ValueError unless True or False."""
    if not isinstance(return_lse, bool):
        raise ValueError(f"return_lse={shown(return_lse)}: expected True or False")


def check_sinks(sinks: Tensor | None, q: Tensor) -> None:
    """Raises ValueError unless sinks are None, or one floating-point logit for each query head of q, beside it."""
    if sinks is None:
        return
    dense = isinstance(sinks, Tensor) and sinks.layout is torch.strided
    if not dense or sinks.shape != q.shape[1:2] or not sinks.dtype.is_floating_point:
        what = f"{sinks.dtype} {list(sinks.shape)}" if dense else f"a {getattr(sinks, 'layout', type(sinks).__name__)}"
        raise ValueError(f"sinks is {what}: expected floating-point [{q.shape[1]}], one for each query head")
    if sinks.device != q.device:
        raise ValueError(f"sinks on {sinks.device}, q on {q.device}: expected one device")
