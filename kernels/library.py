"""Attention as PyTorch operators: known to torch.compile, activation checkpointing and FSDP, differentiable.

    out, lse = torch.ops.flashcp.attention(q, k, v, received, schedule, softmax_scale, "auto", "")

The schedule reaches the operators as one int64 tensor on the CPU, whose length is dynamic: a new plan every step
recompiles nothing, and nobody waits for the device. Importing this module registers the operators. Context parallelism
does not use them (`kernels/interface.py` says why).

Shapes: T local rows, R received rows, H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcp.kernels.inputs import check_inputs, default_scale
from flashcp.kernels.interface import KV, AttentionKernel
from flashcp.kernels.schedule import Schedule, whole_pack_schedule
from flashcp.kernels.selection import select_attention
from flashcp.kernels.tuning import Tuning
from flashcp.sharding.documents import read_document_lengths

_KEPT = 16  # schedules that stay at hand with their tile tables on the device


def dynamic(tensor: Tensor) -> Tensor:
    """The tensor, its length marked as one that changes from call to call: torch.compile compiles once for all."""
    torch._dynamo.decorators.mark_unbacked(tensor, 0)
    return tensor


def schedule_tensor(schedule: Schedule) -> Tensor:
    """The schedule as operators take it: int64 on the CPU, of dynamic length."""
    return dynamic(torch.from_numpy(schedule.array))


@torch.library.custom_op("flashcp::whole_pack", mutates_args=())
def whole_pack(document_lengths: Tensor, tokens: int) -> Tensor:
    """The schedule tensor of one device that holds a whole pack of `tokens`. document_lengths: int64 [documents], CPU.

    Raises ValueError for lengths below 1 and lengths that do not add up.
    """
    lengths = read_document_lengths(document_lengths.numpy())
    if lengths.sum() != tokens:
        raise ValueError(f"document_lengths add up to {lengths.sum()}: expected the {tokens} tokens of q")
    return torch.from_numpy(_whole_pack(lengths.tobytes()).array.copy())


@whole_pack.register_fake
def _(document_lengths: Tensor, tokens: int) -> Tensor:
    return torch.empty(Schedule.array_size(document_lengths.shape[0], document_lengths.shape[0]), dtype=torch.int64)


@torch.library.custom_op("flashcp::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    received: Tensor,
    schedule: Tensor,
    softmax_scale: float,
    implementation: str = "auto",
    tuning: str = "",
) -> tuple[Tensor, Tensor]:
    """Attention of the local queries over a schedule's ranges: out [T, H, D] in q's dtype, log-sum-exp fp32 [T, H].

    q: [T, H, D]. k, v: the local rows [T, K, D]. received: others' rows [R, 2 (K and V), K, D]. schedule: from
    `schedule_tensor` or `whole_pack`. implementation: a name of `kernels/selection.py`. tuning: `Tuning.to_text()`.
    Differentiable in q, k, v and received, not in the log-sum-exp. Raises ValueError for a schedule that reads rows
    which are not there, and for shapes, dtypes, scales, names and tunings that do not fit.
    """
    kernel, plan = _kernel(implementation, q, tuning), _read(schedule, q, k, received)
    _check(q, k, v, received, softmax_scale)
    return kernel.attend(_dense(q), KV(_dense(k), _dense(v)), _halves(received), plan, softmax_scale)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, received: Tensor, schedule: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("flashcp::attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    received: Tensor,
    out: Tensor,
    lse: Tensor,
    schedule: Tensor,
    softmax_scale: float,
    implementation: str = "auto",
    tuning: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attention`: q's, k's and v's in their dtype, those of `received` in fp32 [R, 2, K, D]."""
    kernel, plan = _kernel(implementation, q, tuning), _read(schedule, q, k, received)
    _check(q, k, v, received, softmax_scale)
    tensors = (_dense(grad_out), _dense(q), KV(_dense(k), _dense(v)), _halves(received), out, lse)
    gradients = kernel.gradients(*tensors, plan, softmax_scale)
    return gradients.q, *gradients.local, gradients.received


@attention_backward.register_fake
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, received: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    back = received.new_empty(received.shape, dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), back


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, received, schedule, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, received, *output, schedule)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = attention_backward(grad_out, *ctx.saved_tensors, *ctx.rest)
    return *gradients, None, None, None, None


attention.register_autograd(_differentiate, setup_context=_keep)


def _kernel(implementation: str, q: Tensor, tuning: str) -> AttentionKernel:
    return select_attention(implementation, q.device, _tuning(tuning))


_tuning = lru_cache(maxsize=_KEPT)(Tuning.from_text)


@lru_cache(maxsize=_KEPT)
def _whole_pack(lengths: bytes) -> Schedule:
    return whole_pack_schedule(np.frombuffer(lengths, dtype=np.int64))


class _Array:
    """A schedule's array as the key of a cache: equal when the fingerprints in its head are."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __hash__(self) -> int:
        return int(self.array[0])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Array) and self.array[0] == other.array[0]


@lru_cache(maxsize=_KEPT)
def _schedule(array: _Array) -> Schedule:
    return Schedule.from_array(array.array.copy())


def _check(q: Tensor, k: Tensor, v: Tensor, received: Tensor, softmax_scale: float) -> None:
    check_inputs(q, k, v)
    default_scale(q, softmax_scale)
    if received.shape[1:] != (2, *k.shape[1:]) or received.dtype != k.dtype:
        wanted = f"{k.dtype} [rows, 2, {k.shape[1]}, {k.shape[2]}]"
        raise ValueError(f"received is {received.dtype} {list(received.shape)}: expected {wanted}")


def _read(schedule: Tensor, q: Tensor, k: Tensor, received: Tensor) -> Schedule:
    if schedule.dtype != torch.int64 or len(schedule) < Schedule.array_size(0, 0):
        raise ValueError(f"schedule is {schedule.dtype} {list(schedule.shape)}: expected what `schedule_tensor` gives")
    read = _schedule(_Array(schedule.numpy()))
    for name, rows, there in zip(("q", "k and v", "received"), read.extent, (q, k, received), strict=True):
        if rows > len(there):
            raise ValueError(f"schedule reaches row {rows - 1} of {name}: expected rows below {len(there)}")
    return read


def _dense(x: Tensor) -> Tensor:
    """The tensor with consecutive elements along head_dim: all that kernels ask of a layout."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _halves(received: Tensor) -> KV:
    received = _dense(received)
    return KV(received[:, 0], received[:, 1])
