"""Attention under context parallelism as one differentiable operation: an exchange and a kernel, joined.

`kernels/interface.py` says why this is no registered operator, as `kernels/library.py` has.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashcp.comm.choice import Connection
from flashcp.comm.clock import span
from flashcp.comm.errors import ExchangeError, PeerFailedError, PlanMismatchError
from flashcp.comm.exchanges.exchange import AttentionSettings, Exchange, IncomingKV, Saved
from flashcp.comm.handshake import Handshake, Header, Step
from flashcp.kernels.inputs import check_inputs, default_scale
from flashcp.kernels.interface import KV
from flashcp.sharding.plan import ShardingPlan


@dataclass(frozen=True)
class Call:
    """One attention call on this rank: its plan, what carries and computes it, what all ranks agreed on."""

    plan: ShardingPlan
    exchange: Exchange
    settings: AttentionSettings
    header: Header
    connection: Connection

    @property
    def handshake(self) -> Handshake | None:
        """None for one rank alone."""
        return self.connection.handshake

    def say(self, step: Step) -> Call:
        """Tell the others that this rank has come to a later step of the call; compare now, unless rows can leave and
        local ones be computed before."""
        if self.handshake is None:
            return self
        if self.exchange.puts:
            self.handshake.check_together()
        posted = self.handshake.post(self.header._replace(step=step, **self.connection.oldest))
        if not self.exchange.transport.one_sided:
            with self.settings.clock.measure("wait_ms", "headers"):
                posted.check()
        return replace(self, settings=replace(self.settings, agree=posted.check))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Errors name the call; ranks that do not wait for this one hear of its failure at their next call."""
        try:
            yield
        except ExchangeError as error:
            known = isinstance(error, PlanMismatchError | PeerFailedError)  # to all ranks
            if self.handshake is not None:
                self.handshake.stopped = self.handshake.stopped or str(error)
                if not known:
                    self.handshake.abandon(self.header.call)
            if f"call {self.header.call}" in str(error):
                raise
            raise type(error)(f"{error} (call {self.header.call})") from error


class Handle:
    """K and V rows on their way, for one attention call."""

    def __init__(self, call: Call, incoming: IncomingKV, k: Tensor, v: Tensor) -> None:
        self._call, self._k, self._v = call, k, v
        self._incoming: IncomingKV | None = incoming
        self._versions = _versions(k, v)

    def attention(self, q: Tensor, softmax_scale: float | None = None) -> Tensor:
        """See ContextParallel.attention. Raises RuntimeError when called twice, or when k or v were written to."""
        call, plan, exchange = self._call, self._call.plan, self._call.exchange
        if self._incoming is None:
            raise RuntimeError("this handle's rows were used: prefetch again for another attention call")
        if _versions(self._k, self._v) != self._versions:
            raise RuntimeError("k or v were changed in place after prefetch: their rows have left already")
        check_inputs(q, self._k, self._v, exchange.tokens(plan))
        exchange.check(q.shape[1], self._k.shape[1])
        scale = default_scale(q, softmax_scale)
        header = call.header._replace(query_heads=q.shape[1], scale=scale_code(scale))
        later = exchange.moves_later and header != call.header
        call = replace(call, header=header)
        if torch.is_grad_enabled() and not header.gradients and any(x.requires_grad for x in (q, self._k, self._v)):
            raise RuntimeError("rows were prefetched without gradients: prefetch again where gradients are on")
        incoming, self._incoming = self._incoming, None
        with call.watched():
            if later:
                call = call.say(Step.ATTENTION)
            return _Attention.apply(q, self._k, self._v, call, incoming, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call, incoming: IncomingKV, scale: float) -> Tensor:
        with span(f"attention {call.header.call}, forward"):
            local = KV(_rows(k), _rows(v))
            out, saved = call.exchange.forward(call.plan, _rows(q), local, incoming, call.settings, scale)
        if not call.header.gradients:
            call.exchange.release(saved)
        elif any(ctx.needs_input_grad):
            ctx.save_for_backward(*saved)
            ctx.call, ctx.scale = call, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        saved = Saved(*ctx.saved_tensors)
        with call.watched(), span(f"attention {call.header.call}, backward"):
            call = call.say(Step.BACKWARD)
            gradients = call.exchange.backward(call.plan, _rows(grad_out), saved, call.settings, ctx.scale)
        return *(gradient.to(grad_out.dtype) for gradient in gradients), None, None, None


def scale_code(scale: float) -> int:
    """A float as the int64 of the same bits, for a header."""
    return struct.unpack("<q", struct.pack("<d", scale))[0]


def _versions(*tensors: Tensor) -> list[int]:
    """How often each tensor was written to (inference tensors do not count)."""
    return [0 if x.is_inference() else x._version for x in tensors]


def _rows(x: Tensor) -> Tensor:
    """The tensor with consecutive elements along head_dim: all that kernels ask of a layout."""
    return x if x.stride(-1) == 1 else x.contiguous()
