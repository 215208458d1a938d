"""Attention under context parallelism as one differentiable operation: an exchange and a kernel, joined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashcp.comm.exchanges.base import Exchange, Flight, Job, Kept
from flashcp.comm.handshake import Handshake, Header
from flashcp.kernels.inputs import check_inputs, default_scale
from flashcp.sharding.plan import ShardingPlan

__all__ = ["Call", "Handle"]


@dataclass(frozen=True)
class Call:
    """One attention call on this rank: its plan, what carries and computes it, what all ranks agreed on.

    handshake: None for one rank alone.
    """

    plan: ShardingPlan
    exchange: Exchange
    job: Job
    header: Header
    handshake: Handshake | None


class Handle:
    """K and V rows on their way, for one attention call."""

    def __init__(self, call: Call, flight: Flight, k: Tensor, v: Tensor) -> None:
        self._call, self._k, self._v = call, k, v
        self._flight: Flight | None = flight

    def attention(self, q: Tensor, softmax_scale: float | None = None) -> Tensor:
        """See ContextParallel.attention. Raises RuntimeError when called a second time."""
        if self._flight is None:
            raise RuntimeError("this handle's rows were used: prefetch again for another attention call")
        plan, exchange = self._call.plan, self._call.exchange
        check_inputs(q, self._k, self._v, int(plan.tokens[exchange.transport.rank]))
        exchange.check(q.shape[1], self._k.shape[1])
        scale = default_scale(q, softmax_scale)
        flight, self._flight = self._flight, None
        return _Attention.apply(q, self._k, self._v, self._call, flight, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call, flight: Flight, scale: float) -> Tensor:
        out, kept = call.exchange.forward(call.plan, _rows(q), _rows(k), _rows(v), flight, call.job, scale)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*kept)
            ctx.call, ctx.scale = call, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        kept = Kept(*ctx.saved_tensors)
        if call.handshake is not None:
            with call.job.clock.measure("wait_ms"):
                call.handshake.compare(call.header._replace(backward=1))
        gradients = call.exchange.backward(call.plan, _rows(grad_out), kept, call.job, ctx.scale)
        grad_q, grad_k, grad_v = (gradient.to(grad_out.dtype) for gradient in gradients)
        return grad_q, grad_k, grad_v, None, None, None


def _rows(x: Tensor) -> Tensor:
    """The tensor with consecutive elements along head_dim: all that kernels ask of a layout."""
    return x if x.stride(-1) == 1 else x.contiguous()
