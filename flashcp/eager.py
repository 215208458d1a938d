"""The operator where nothing is compiled: what waits for the backward is saved as the tensors that it is made of.

Hooks on saved tensors see them all, and may copy them away and back (`torch.autograd.graph.save_on_cpu`). Compiled code
saves a number in their place (`operator.py`), which such a hook would part from what it stands for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashcp.comm.exchanges.exchange import Saved
from flashcp.operator import Kept, attention, differentiate, refuse_gradient
from flashcp.sharding.numbered import numbered


class EagerAttention(torch.autograd.Function):
    """Takes what the operator takes."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        q, k, v, sinks, *_, return_lse, gradients = given
        out, lse, kept = attention(*given)
        if not return_lse:
            ctx.mark_non_differentiable(lse)
        if gradients and any(ctx.needs_input_grad):
            ctx.set_materialize_grads(False)  # a gradient of the log-sum-exp is none, or one that nobody computes
            waiting: Kept = numbered(int(kept))
            ctx.call, ctx.like = waiting.call, {"size": out.shape, "dtype": out.dtype, "device": out.device}
            ctx.save_for_backward(*waiting.whole(q, k, v, out, lse), sinks)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_gradient(grad_lse)
        *of_call, sinks = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros(**ctx.like)  # other ranks come to this backward: so does this one
        return *differentiate(ctx.call, Saved(*of_call), sinks, grad_out), *(None,) * 10
