"""Sinks: a learnt logit a query head that joins every row's softmax and brings no value (gpt-oss; arXiv 2309.17453).

No kernel knows them. They rescale what a kernel gives; with output and log-sum-exp after sinks in the place of those
before, weights exp(score - lse) are those of the whole softmax, and every kernel's `gradients` is right as it stands.

Shapes: T rows, H query heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] in its dtype and log-sum-exp fp32 [T, H], sinks [H] joined. Rows that read nothing stay 0."""
    joined = torch.logaddexp(lse, _finite(sinks))
    # A sink of -inf beside a row of -inf is a row of no weights at all.
    rescale = torch.where(joined == -torch.inf, 0.0, torch.exp(lse - joined))
    return (out.float() * rescale[..., None]).to(out.dtype), joined


def _finite(sinks: Tensor) -> Tensor:
    """In fp32. A sink of infinity takes all weight, and so does the largest number; inf - inf would be NaN."""
    return sinks.float().clamp(max=torch.finfo(torch.float32).max)


def sink_gradients(out: Tensor, grad_out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Gradients of the sinks, fp32 [H]: minus the sum over rows of exp(sink - lse) (out . grad_out).

    out, lse: after `add_sinks`.
    """
    weight = torch.where(lse == -torch.inf, 0.0, torch.exp(_finite(sinks) - lse))
    return -(weight * (out.float() * grad_out.float()).sum(-1)).sum(0)
