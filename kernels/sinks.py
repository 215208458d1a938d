"""Sinks: a learnt logit a query head that joins the denominator of every row's softmax (gpt-oss; arXiv 2309.17453).

No kernel needs to know: they change what attention gave, and with the changed output and log-sum-exp in place of the
others every kernel's gradients are right as they stand.

Shapes: T rows, H query heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Output [T, H, D], in its dtype, and log-sum-exp fp32 [T, H] of softmaxes with one logit more, sinks [H]."""
    with_sinks = torch.logaddexp(lse, sinks.detach().float())
    return (out.float() * torch.exp(lse - with_sinks)[..., None]).to(out.dtype), with_sinks


def sink_gradients(out: Tensor, grad_out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Gradients of the sinks, fp32 [H], from what `add_sinks` gave."""
    weights = torch.exp(sinks.detach().float() - lse)  # [T, H]
    return -(weights * (out.float() * grad_out.float()).sum(-1)).sum(0)
