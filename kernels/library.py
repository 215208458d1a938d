"""Attention as PyTorch operators: known to torch.compile, activation checkpointing and FSDP, differentiable.

    out, lse = torch.ops.flashcp.attention(q, k, v, received, schedule, softmax_scale, "auto", "")

The schedule reaches the operators as one int64 tensor on the CPU, whose length is dynamic: a new plan every step
recompiles nothing, and nobody waits for the device. Importing this module registers the operators. Context parallelism
has operators of its own (`flashcp/operator.py`).

Shapes: T local rows, R received rows, H query heads, K KV heads, D head_dim (v's may be another one).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcp.kernels.inputs import check_inputs, check_sinks, default_scale, read_softcap
from flashcp.kernels.interface import KV, AttentionKernel
from flashcp.kernels.schedule import Schedule, whole_pack_schedule
from flashcp.kernels.selection import select_attention
from flashcp.kernels.sinks import add_sinks, sink_gradients
from flashcp.kernels.tuning import Tuning
from flashcp.sharding.documents import read_document_lengths
from flashcp.sharding.mask import KINDS, Mask
from flashcp.sharding.masks import list_masks, read_masks

_KEPT = 16  # schedules that stay at hand with their tile tables on the device


def dynamic(tensor: Tensor) -> Tensor:
    """The tensor, its length marked as one that changes from call to call: torch.compile compiles once for all."""
    torch._dynamo.decorators.mark_unbacked(tensor, 0)
    return tensor


def schedule_tensor(schedule: Schedule) -> Tensor:
    """The schedule as operators take it: int64 on the CPU, of dynamic length."""
    return dynamic(torch.from_numpy(schedule.array))


def mask_tensor(masks: Mask | Sequence[Mask] | None) -> Tensor | None:
    """Masks as `whole_pack` takes them, int64 on the CPU: whether it is one for all documents, then of each mask its
    kind, size, number of blocks, and the blocks' ends. None: causal.

    Under torch.compile they are constants. Raises ValueError for what no masks are.
    """
    if masks is None:
        return None
    given = [masks] if isinstance(masks, Mask) else list_masks(masks)
    numbers = [int(isinstance(masks, Mask))]
    for mask in given:
        numbers += [KINDS.index(mask.kind), mask.size, len(mask.blocks)]
        for start, stop in mask.blocks:
            numbers += [start, stop]
    return torch.tensor(numbers, dtype=torch.int64)


@torch.library.custom_op("flashcp::whole_pack", mutates_args=())
def whole_pack(document_lengths: Tensor, tokens: int, masks: Tensor | None = None) -> Tensor:
    """The schedule tensor of one device that holds a whole pack of `tokens`. document_lengths: int64 [documents], CPU.
    masks: from `mask_tensor`.

    Raises ValueError for lengths below 1 and lengths that do not add up, for as many masks as there are no documents,
    and for blocks beyond their document.
    """
    lengths = read_document_lengths(document_lengths.numpy())
    if lengths.sum() != tokens:
        raise ValueError(f"document_lengths add up to {lengths.sum()}: expected the {tokens} tokens of q")
    said = b"" if masks is None else masks.numpy().tobytes()
    return torch.from_numpy(_whole_pack(lengths.tobytes(), said).array.copy())


@whole_pack.register_fake
def _(document_lengths: Tensor, tokens: int, masks: Tensor | None = None) -> Tensor:
    documents = document_lengths.shape[0]
    if masks is None:
        return torch.empty(Schedule.array_size(documents, documents), dtype=torch.int64)
    # Masks that set no limit in any document leave no trace.
    return torch.empty(torch.library.get_ctx().new_dynamic_size(min=Schedule.array_size(0, 0)), dtype=torch.int64)


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
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    keeps_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of the local queries over a schedule's ranges: out [T, H, D] in q's dtype, log-sum-exp fp32 [T, H].

    q: [T, H, D]. k, v: the local rows [T, K, D]. received: others' rows [R, 2 (K and V), K, D]. schedule: from
    `schedule_tensor` or `whole_pack`. implementation: a name of `kernels/selection.py`. tuning: `Tuning.to_text()`.
    softcap: of the scores, 0.0 for none. sinks: [H], logits that join each row's softmax.
    keeps_lse: the log-sum-exp is for others to compute with. It carries no gradient: one that arrives for it, and is
    not zero, raises RuntimeError in the backward; without it the log-sum-exp requires none.
    Differentiable in q, k, v, received and sinks. Raises ValueError for a schedule that reads rows which are not there,
    and for shapes, dtypes, scales, names and tunings that do not fit.
    """
    kernel, plan = _kernel(implementation, q, tuning), _read(schedule, q, k, received)
    _check(kernel, q, k, v, received, softmax_scale, softcap, sinks)
    tensors = _dense(q), KV(_dense(k), _dense(v)), _halves(received)
    out, lse = kernel.attend(*tensors, plan, softmax_scale, softcap=softcap)
    return (out, lse) if sinks is None else add_sinks(out, lse, sinks)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, received: Tensor, schedule: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:2], v.shape[2])), q.new_empty(q.shape[:2], dtype=torch.float32)


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
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attention`: q's, k's and v's in their dtype, those of `received` in fp32 [R, 2, K, D], those of
    sinks in fp32, [0] without any."""
    # Compiled code hands over zeros where none arrived.
    if grad_lse is not None and grad_lse.any():
        raise RuntimeError("a gradient arrived for the log-sum-exp, which carries none: use it under torch.no_grad()")
    kernel, plan = _kernel(implementation, q, tuning), _read(schedule, q, k, received)
    _check(kernel, q, k, v, received, softmax_scale, softcap, sinks)
    tensors = (_dense(grad_out), _dense(q), KV(_dense(k), _dense(v)), _halves(received), out, lse)
    gradients = kernel.gradients(*tensors, plan, softmax_scale, softcap=softcap)
    of_sinks = lse.new_empty(0) if sinks is None else sink_gradients(out, grad_out, lse, sinks)
    return gradients.q, *gradients.local, gradients.received, of_sinks


@attention_backward.register_fake
def _(
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
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    back = received.new_empty(received.shape, dtype=torch.float32)
    of_sinks = lse.new_empty(0 if sinks is None else sinks.shape[0])
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), back, of_sinks


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, received, schedule, *ctx.rest, sinks, keeps_lse = inputs
    ctx.save_for_backward(q, k, v, received, *output, schedule, sinks)
    ctx.set_materialize_grads(False)
    if not keeps_lse:
        ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, sinks = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(tensors[4])
    *gradients, of_sinks = attention_backward(grad_out, *tensors, *ctx.rest, sinks, grad_lse)
    of_sinks = None if sinks is None else of_sinks.to(sinks.dtype)
    return *gradients, None, None, None, None, None, of_sinks, None


attention.register_autograd(_differentiate, setup_context=_keep)


def _kernel(implementation: str, q: Tensor, tuning: str) -> AttentionKernel:
    return select_attention(implementation, q.device, _tuning(tuning))


_tuning = lru_cache(maxsize=_KEPT)(Tuning.from_text)


@lru_cache(maxsize=_KEPT)
def _whole_pack(lengths: bytes, masks: bytes) -> Schedule:
    read = np.frombuffer(lengths, dtype=np.int64)
    return whole_pack_schedule(read, read_masks(_masks(np.frombuffer(masks, dtype=np.int64).tolist()), read))


def _masks(numbers: list[int]) -> Mask | list[Mask] | None:
    """The masks that `mask_tensor` was made from."""
    masks, at = [], 1
    while at < len(numbers):
        kind, size, count = numbers[at : at + 3]
        ends = numbers[at + 3 : at + 3 + 2 * count]
        masks.append(Mask(KINDS[kind], size or None, list(zip(ends[::2], ends[1::2], strict=True))))
        at += 3 + 2 * count
    if not numbers:
        return None
    return masks[0] if numbers[0] else masks


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


def _check(
    kernel: AttentionKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    received: Tensor,
    softmax_scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> None:
    check_inputs(q, k, v, own_v_dim=kernel.own_v_dim and not len(received))
    default_scale(q, softmax_scale)
    read_softcap(softcap or None)
    check_sinks(sinks, q)
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
