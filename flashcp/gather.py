"""The two halves of attention under context parallelism, for models that do something in between.

`gather` brings the rows of any tensor that this rank's queries read, `attend` computes on rows that are here. A model
with a latent KV (MLA) gathers the latent and expands what arrives; layers that share KV gather it once.

Shapes: T local rows, R rows of the receive buffer, H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from flashcp.call import Call
from flashcp.comm.clock import Clock, span
from flashcp.comm.exchanges.exchange import Exchange, IncomingKV
from flashcp.comm.exchanges.receiving import ReceivingExchange
from flashcp.comm.header import Header, Step
from flashcp.kernels.inputs import check_heads, check_inputs
from flashcp.kernels.interface import KV, AttentionKernel
from flashcp.kernels.schedule import Schedule
from flashcp.kernels.scores import Scores
from flashcp.kernels.sinks import add_sinks, sink_gradients
from flashcp.operator import refuse_gradient
from flashcp.untraced import untraced


class Gathering:
    """Rows under way to this rank; `rows()` returns them."""

    def __init__(self, call: Call, x: Tensor) -> None:
        self._call, self._x, self._used = call, x, False
        self._incoming = check_receives(call.exchange).start(call.plan, *halves(x))

    @untraced
    def rows(self) -> Tensor:
        """The rows that this rank's queries read, [R, ...] in buffer order, differentiable. Raises RuntimeError when
        called twice, and where they left without gradients and now want some; ExchangeError as ContextParallel says."""
        if self._used:
            raise RuntimeError("this handle's rows were taken: gather again")
        check_gradients(self._x, self._call.header)
        self._used = True
        with self._call.watched():
            return _Gather.apply(self._x, self._call, self._incoming)


def check_gradients(x: Tensor, header: Header) -> None:
    """Raise RuntimeError for rows that left where nobody wanted gradients, and now want some."""
    if torch.is_grad_enabled() and x.requires_grad and not header.gradients:
        raise RuntimeError("rows were prefetched without gradients: prefetch again where gradients are on")


def halves(x: Tensor) -> KV:
    """A tensor's rows [T, ...] as two halves [T, 1, D]: exchanges move pairs of rows, K and V. An odd row gets one
    column more."""
    flat = x.reshape(len(x), math.prod(x.shape[1:]))
    if flat.shape[1] % 2:
        flat = pad(flat, (0, 1))
    return KV(*(half[:, None] for half in flat.chunk(2, dim=1)))


def whole(pairs: Tensor, row: torch.Size) -> Tensor:
    """Rows [R, ...] of shape `row` again, from pairs [R, 2, 1, D]."""
    return pairs.flatten(1)[:, : math.prod(row)].reshape(len(pairs), *row)


def check_receives(exchange: Exchange) -> ReceivingExchange:
    """The exchange. Raises ValueError for one that brings no rows to a rank."""
    if not isinstance(exchange, ReceivingExchange):
        raise ValueError(
            f"gather and attend with exchange={exchange.name!r}, ranks sharing out heads: expected exact, compacted, "
            "all_gather or ring with head_ranks=1"
        )
    return exchange


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Call, incoming: IncomingKV) -> Tensor:
        ctx.call, ctx.row, ctx.dtype = call, x.shape[1:], x.dtype
        settings, exchange = call.settings, check_receives(call.exchange)
        settings.meet()
        with settings.clock.measure("exposed_exchange_ms"):
            incoming.transfer.finish()
        rows = whole(incoming.inbox.rows, ctx.row).clone()
        exchange.transport.free(incoming.inbox.ticket)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        with call.watched(), span(f"gather {call.header.call}, backward"):
            call = call.say(Step.BACKWARD)
            pairs = torch.stack(halves(grad), dim=1)  # [R, 2, 1, D]
            home = check_receives(call.exchange).send_home(call.plan, pairs, call.settings)
            local = whole(torch.stack(home, dim=1), ctx.row)
        return local.to(ctx.dtype), None, None


class Pairs(NamedTuple):
    """What attention computes on: q [T, H, D], k and v of this rank [T, K, D], and of others [R, K, D]; values may have
    another D."""

    q: Tensor
    k: Tensor
    v: Tensor
    received_k: Tensor
    received_v: Tensor


def check_pairs(tensors: Pairs, tokens: int) -> None:
    """Raises ValueError unless all five fit together."""
    check_heads(tensors.q, tensors.k, tensors.v, own_v_dim=True)
    for local, received, name in ((tensors.k, tensors.received_k, "k"), (tensors.v, tensors.received_v, "v")):
        if not isinstance(received, Tensor) or received.shape[1:] != local.shape[1:] or received.dtype != local.dtype:
            is_tensor = isinstance(received, Tensor)
            given = f"{received.dtype} {list(received.shape)}" if is_tensor else type(received).__name__
            columns = ", ".join(map(str, local.shape[1:]))
            raise ValueError(f"received_{name} is {given}: expected {local.dtype} [rows, {columns}]")
    if len(tensors.received_k) != len(tensors.received_v):
        rows = f"{len(tensors.received_k)} and {len(tensors.received_v)}"
        raise ValueError(f"received_k and received_v have {rows} rows: expected as many")
    q, k, v, *_ = _one_width(tensors)
    check_inputs(q, k, v, tokens)


def attend(
    tensors: Pairs, kernel: AttentionKernel, schedule: Schedule, scores: Scores, clock: Clock
) -> tuple[Tensor, Tensor]:
    """Output [T, H, D of v] and log-sum-exp [T, H] over rows that are all here, differentiable in all but the latter.

    Gradients of received keys and values come in one buffer: the narrower of both is filled with zeros.
    """
    out, lse = _Attend.apply(*_one_width(tensors), scores.sinks, kernel, schedule, scores, clock)
    return out[..., : tensors.v.shape[2]], lse


def _one_width(tensors: Pairs) -> list[Tensor]:
    wide = max(x.shape[-1] for x in tensors)
    return [pad(x, (0, wide - x.shape[-1])) if x.shape[-1] < wide else x for x in tensors]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        received_k: Tensor,
        received_v: Tensor,
        sinks: Tensor | None,
        kernel: AttentionKernel,
        schedule: Schedule,
        scores: Scores,
        clock: Clock,
    ) -> tuple[Tensor, Tensor]:
        ctx.of_call = kernel, schedule, scores._replace(sinks=None), clock
        ctx.set_materialize_grads(False)
        with clock.measure("attention_ms"):
            local, received = KV(k, v), KV(received_k, received_v)
            out, lse = kernel.attend(q, local, received, schedule, scores.scale, softcap=scores.softcap)
            if sinks is not None:
                out, lse = add_sinks(out, lse, sinks)
        ctx.save_for_backward(q, k, v, received_k, received_v, sinks, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_gradient(grad_lse)
        q, k, v, received_k, received_v, sinks, out, lse = ctx.saved_tensors
        kernel, schedule, scores, clock = ctx.of_call
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
        with clock.measure("attention_ms"):
            of_q, local, received = kernel.gradients(
                grad_out, q, KV(k, v), KV(received_k, received_v), out, lse, schedule, scores.scale,
                received_dtype=received_k.dtype, softcap=scores.softcap,
            )  # fmt: skip
        of_sinks = None if sinks is None else sink_gradients(out, grad_out, lse, sinks).to(sinks.dtype)
        return of_q, *local, *received.unbind(1), of_sinks, None, None, None, None
