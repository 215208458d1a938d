"""Attention under context parallelism as one differentiable operation: an exchange and a kernel, joined.

`kernels/interface.py` says why this is no registered operator, as `kernels/library.py` has.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashcp.comm.choice import Connection
from flashcp.comm.clock import span
from flashcp.comm.errors import ExchangeError, PeerFailedError, PlanMismatchError
from flashcp.comm.exchanges.exchange import AttentionSettings, Exchange, IncomingKV, Saved
from flashcp.comm.handshake import Handshake, Header, Step
from flashcp.kernels.inputs import check_inputs, check_return_lse
from flashcp.kernels.interface import KV
from flashcp.kernels.scores import Scores, read_scores
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

    @overload
    def attention(
        self, q: Tensor, softmax_scale: float | None = None, *, softcap: float | None = None,
        sinks: Tensor | None = None, return_lse: Literal[False] = False,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def attention(
        self, q: Tensor, softmax_scale: float | None = None, *, softcap: float | None = None,
        sinks: Tensor | None = None, return_lse: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip
    def attention(
        self,
        q: Tensor,
        softmax_scale: float | None = None,
        *,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See ContextParallel.attention. Raises RuntimeError when called twice, or when k or v were written to."""
        call, plan, exchange = self._call, self._call.plan, self._call.exchange
        if self._incoming is None:
            raise RuntimeError("this handle's rows were used: prefetch again for another attention call")
        if _versions(self._k, self._v) != self._versions:
            raise RuntimeError("k or v were changed in place after prefetch: their rows have left already")
        check_inputs(q, self._k, self._v, exchange.tokens(plan))
        exchange.check(q.shape[1], self._k.shape[1])
        scores = read_scores(q, softmax_scale, softcap, sinks)
        header = call.header._replace(**query_codes(q, scores, return_lse))
        later = exchange.moves_later and header != call.header
        call = replace(call, header=header, settings=replace(call.settings, scores=scores))
        inputs = [x for x in (q, self._k, self._v, sinks) if x is not None]
        if torch.is_grad_enabled() and not header.gradients and any(x.requires_grad for x in inputs):
            raise RuntimeError("rows were prefetched without gradients: prefetch again where gradients are on")
        incoming, self._incoming = self._incoming, None
        with call.watched():
            if later:
                call = call.say(Step.ATTENTION)
            out, lse = _Attention.apply(q, self._k, self._v, sinks, call, incoming)
        return (out, lse) if return_lse else out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: Call, incoming: IncomingKV
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and the log-sum-exp where it is asked for."""
        with span(f"attention {call.header.call}, forward"):
            local = KV(_rows(k), _rows(v))
            out, saved = call.exchange.forward(call.plan, _rows(q), local, incoming, call.settings)
            lse = call.exchange.log_sums(call.plan, saved) if call.header.log_sums else None
        if not call.header.gradients:
            call.exchange.release(saved)
        elif any(ctx.needs_input_grad):
            ctx.set_materialize_grads(False)  # a gradient of the log-sum-exp is none, or one that nobody computes
            ctx.save_for_backward(*saved, sinks)
            ctx.call = call
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        refuse_gradient(grad_lse)
        *of_call, sinks = ctx.saved_tensors
        saved = Saved(*of_call)
        if grad_out is None:
            grad_out = torch.zeros_like(saved.q)
        scores = call.settings.scores._replace(sinks=sinks)
        with call.watched(), span(f"attention {call.header.call}, backward"):
            call = call.say(Step.BACKWARD)
            settings = replace(call.settings, scores=scores)
            *gradients, of_sinks = call.exchange.backward(call.plan, _rows(grad_out), saved, settings)
        if of_sinks is not None:
            of_sinks = of_sinks.to(sinks.dtype)
        return *(gradient.to(grad_out.dtype) for gradient in gradients), of_sinks, None, None


def refuse_gradient(grad_lse: Tensor | None) -> None:
    """Raise RuntimeError for a gradient of the log-sum-exp, which nobody computes."""
    if grad_lse is not None:
        raise RuntimeError("the log-sum-exp of attention has no gradient: expected it detached")


def query_codes(q: Tensor, scores: Scores, return_lse: bool) -> dict[str, int]:
    """What a header says of queries and their scores; floats as the int64 of the same bits."""
    check_return_lse(return_lse)
    scale, softcap = (struct.unpack("<q", struct.pack("<d", number))[0] for number in scores[:2])
    with_sinks = scores.sinks is not None
    return {
        "query_heads": q.shape[1],
        "scale": scale,
        "softcap": softcap,
        "sinks": int(with_sinks),
        "log_sums": int(return_lse),
    }


def _versions(*tensors: Tensor) -> list[int]:
    """How often each tensor was written to (inference tensors do not count)."""
    return [0 if x.is_inference() else x._version for x in tensors]


def _rows(x: Tensor) -> Tensor:
    """The tensor with consecutive elements along head_dim: all that kernels ask of a layout."""
    return x if x.stride(-1) == 1 else x.contiguous()
