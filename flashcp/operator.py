"""Attention under context parallelism as PyTorch operators: known to torch.compile, checkpointing and FSDP.

    begun = prefetch(k, v, caller_number, plan, window, chunk, gradients)
    out, lse, kept = attention(q, k, v, sinks, begun or None, caller_number, plan, ...)

Plans, ranks, rows under way and what waits for the backward reach an operator by number (`sharding/numbered.py`), so
that other plans compile nothing anew. Rows under way and what waits live as long as their number: the compiler and
checkpointing keep, drop and make it again as they do with any tensor. Calls that are not compiled go through
`flashcp/eager.py`.

All ranks come to the same operators in the same order. Compiled code leaves it so, for all ranks compile one program:
what the compiler moves, drops or repeats, it does on every rank. Headers name what differs.

Shapes: T rank's rows, H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from flashcp.call import Begun, Call, Queries, query_codes
from flashcp.comm.clock import span
from flashcp.comm.exchanges.exchange import InputGradients, Saved
from flashcp.comm.header import Step
from flashcp.kernels.inputs import check_inputs
from flashcp.kernels.interface import KV
from flashcp.kernels.scores import Scores
from flashcp.sharding.numbered import keeping_number_of, numbered
from flashcp.sharding.plan import ShardingPlan
from flashcp.untraced import untraced

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Caller(Protocol):
    """What the operators need of `flashcp.ContextParallel`."""

    def begin(
        self, k: Tensor, v: Tensor, plan: ShardingPlan, window: int | None, chunk: int | None, gradients: bool,
        queries: Queries | None,
    ) -> Begun:  # fmt: skip
        """Agree with the other ranks and let rows leave."""
        ...


_NAME = "flashcp::context_parallel_"
_OPERATORS = torch.library.Library("flashcp", "FRAGMENT")


def _operator(name: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Registers a function as the operator `flashcp::context_parallel_NAME`, on all devices; `untraced` says why it is
    not `torch.library.custom_op`."""

    def register(function: Callable[_P, _R]) -> Callable[_P, _R]:
        schema = torch.library.infer_schema(function, mutates_args=(), op_name=_NAME + name)
        _OPERATORS.define(schema.removeprefix("flashcp::"))
        _OPERATORS.impl(f"context_parallel_{name}", untraced(function), "CompositeExplicitAutograd")
        operator: Any = getattr(torch.ops.flashcp, f"context_parallel_{name}").default
        return operator

    return register


def _shapes(name: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Registers what an operator returns without computing it."""
    return torch.library.register_fake(_NAME + name, lib=_OPERATORS)


@dataclass
class Kept:
    """What waits for the backward. None in `saved`: the operator's own input or output, which waits as such."""

    call: Call
    saved: Saved

    def whole(self, *own: Tensor | None) -> Saved:
        """With the operator's q, k, v, output and log-sum-exp where None stands for them."""
        pairs = zip(self.saved, (*own, None, None), strict=True)
        return Saved(*(given if held is None else held for held, given in pairs))  # type: ignore[arg-type]


@_operator("prefetch")
def prefetch(
    k: Tensor, v: Tensor, caller_number: Tensor, plan: Tensor, window: int | None, chunk: int | None, gradients: bool
) -> Tensor:
    """K and V rows leave. Returns the number of the call that they are for. gradients: whether a backward may follow.

    k, v: [T, K, D]. caller_number, plan: as `numbered` knows them.
    """
    caller: Caller = numbered(int(caller_number))
    return torch.from_numpy(keeping_number_of(caller.begin(k, v, _plan(int(plan)), window, chunk, gradients, None)))


@_shapes("prefetch")
def _(*_: Any) -> Tensor:
    return torch.empty(1, dtype=torch.int64, device="cpu")


@_operator("attention")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    begun: Tensor | None,
    caller_number: Tensor,
    plan: Tensor,
    softmax_scale: float,
    softcap: float,
    window: int | None,
    chunk: int | None,
    inputs_wait: bool,
    return_lse: bool,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [T, H, D], log-sum-exp fp32 [T, H], [0] where it is not asked for, and the number of what is kept.

    begun: the number that `prefetch` returned for k, v, plan, window and chunk; None: rows leave now. inputs_wait: see
    Exchange. The others: as for ContextParallel.attention. Differentiable in q, k, v and sinks. Raises as
    ContextParallel does.
    """
    queries = Queries(q, Scores(softmax_scale, softcap, sinks), return_lse)
    # Kernels choose their own precision.
    with torch.autocast(q.device.type, enabled=False):
        if begun is None:
            caller: Caller = numbered(int(caller_number))
            start = caller.begin(k, v, _plan(int(plan)), window, chunk, gradients, queries)
        else:
            start = numbered(int(begun))
        call, saved, out, lse = _attend(start, queries, gradients)
    if not gradients:
        return out, lse, torch.zeros(1, dtype=torch.int64)
    if inputs_wait:
        given = (q, k, v, out, lse, None, None)
        saved = Saved(*(None if x is y else x for x, y in zip(saved, given, strict=True)))  # type: ignore[arg-type]
    return out, lse, torch.from_numpy(keeping_number_of(Kept(call, saved)))


@_shapes("attention")
def _(q: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, return_lse, _ = others
    lse = q.new_empty(q.shape[:2] if return_lse else (0,), dtype=torch.float32)
    return q.new_empty(q.shape), lse, torch.empty(1, dtype=torch.int64, device="cpu")


def _attend(start: Begun, queries: Queries, gradients: bool) -> tuple[Call, Saved, Tensor, Tensor]:
    """Attention over rows that are on their way: the call, what its backward needs, output and log-sum-exp."""
    (q, scores, return_lse), k, v, exchange = queries, start.k, start.v, start.call.exchange
    incoming = start.take()
    check_inputs(q, k, v, exchange.tokens(start.call.plan))
    exchange.check(q.shape[1], k.shape[1])
    header = start.call.header._replace(**query_codes(queries))
    if gradients and not header.gradients:
        raise RuntimeError("rows were prefetched without gradients: prefetch again where gradients are on")
    call = replace(start.call, header=header, settings=replace(start.call.settings, scores=scores))
    start.incoming = None
    with call.watched():
        if exchange.moves_later and header != start.call.header:
            call = call.say(Step.ATTENTION)
        with span(f"attention {header.call}, forward"):
            out, saved = exchange.forward(call.plan, _rows(q), KV(_rows(k), _rows(v)), incoming, call.settings)
            lse = exchange.log_sums(call.plan, saved) if return_lse else q.new_empty(0, dtype=torch.float32)
    if not gradients:
        exchange.release(saved)
    return call, saved, out, lse


@_operator("attention_backward")
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    sinks: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    kept: Tensor,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in grad_out's dtype, and of the sinks in theirs, [0] without any. None: is in `kept`."""
    # Compiled code hands over zeros where none arrived.
    if grad_lse is not None and grad_lse.any():
        refuse_gradient(grad_lse)
    waited: Kept = numbered(int(kept))
    saved = waited.whole(*(None if x is None else _rows(x) for x in (q, k, v)), out, lse)
    grad_q, grad_k, grad_v, of_sinks = differentiate(waited.call, saved, sinks, grad_out)
    own = grad_out.new_empty(0) if of_sinks is None else of_sinks
    return grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous(), own


def differentiate(call: Call, saved: Saved, sinks: Tensor | None, grad_out: Tensor) -> InputGradients:
    """Gradients of q, k and v in grad_out's dtype, and of the sinks in theirs."""
    no_autocast = torch.autocast(grad_out.device.type, enabled=False)
    with call.watched(), span(f"attention {call.header.call}, backward"), no_autocast:
        call = call.say(Step.BACKWARD)
        settings = replace(call.settings, scores=call.settings.scores._replace(sinks=sinks))
        gradients = call.exchange.backward(call.plan, _rows(grad_out), saved, settings)
    of_sinks = None if sinks is None or gradients.sinks is None else gradients.sinks.to(sinks.dtype)
    grad_q, grad_k, grad_v = (x.to(grad_out.dtype) for x in gradients[:3])
    return InputGradients(grad_q, grad_k, grad_v, of_sinks)


@_shapes("attention_backward")
def _(grad_out: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, _, _, sinks, *_, kv_heads = others
    of_rows = (grad_out.shape[0], kv_heads, grad_out.shape[2])
    of_sinks = grad_out.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return grad_out.new_empty(grad_out.shape), grad_out.new_empty(of_rows), grad_out.new_empty(of_rows), of_sinks


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, sinks, *_, inputs_wait, return_lse, _ = inputs
    out, lse, kept = output
    waiting = (q, k, v, out, lse) if inputs_wait else (None,) * 5
    ctx.save_for_backward(*waiting, sinks, kept)
    ctx.like, ctx.kv_heads = {"size": out.shape, "dtype": out.dtype, "device": out.device}, k.shape[1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((kept,) if return_lse else (lse, kept)))


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, sinks, kept = ctx.saved_tensors
    if grad_out is None:
        refuse_gradient(grad_lse)
        grad_out = torch.zeros(**ctx.like)  # other ranks come to this backward: so does this one
    *gradients, of_sinks = attention_backward(grad_out, grad_lse, q, k, v, sinks, out, lse, kept, ctx.kv_heads)
    return *gradients, None if sinks is None else of_sinks, *(None,) * 10


torch.library.register_autograd(_NAME + "attention", _differentiate, setup_context=_keep, lib=_OPERATORS)


def refuse_gradient(grad_lse: Tensor | None) -> None:
    """Raise RuntimeError for a gradient of the log-sum-exp, which nobody computes."""
    if grad_lse is not None:
        raise RuntimeError("the log-sum-exp of attention has no gradient: expected it detached")


@lru_cache(maxsize=64)
def _plan(number: int) -> ShardingPlan:
    """Keeps the last ones: compiled checkpointing calls again for a plan that its caller may have let go."""
    return numbered(number)


def _rows(x: Tensor) -> Tensor:
    """The tensor with consecutive elements along head_dim: all that kernels ask of a layout."""
    return x if x.stride(-1) == 1 else x.contiguous()
