"""Gradients of parameters over the ranks that share packs: sums, for each rank's loss is its own rows' part of one."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

_BUCKET_BYTES = 25 << 20
_prepared: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def prepare(model: nn.Module) -> None:
    """Let every DistributedDataParallel and fully_shard inside the model sum gradients over its ranks.

    Raises ValueError for a model without any, and for FSDP1.
    """
    _check_model(model)
    kinds = (DistributedDataParallel, FSDPModule, FullyShardedDataParallel)
    wrappers = [module for module in model.modules() if isinstance(module, kinds)]
    if not wrappers or any(isinstance(one, FullyShardedDataParallel) for one in wrappers):
        kind = "FullyShardedDataParallel" if wrappers else f"{type(model).__name__} without such modules"
        raise ValueError(f"model is a {kind}: expected DistributedDataParallel or fully_shard (FSDP2)")
    for one in wrappers:
        if one in _prepared:
            continue
        if isinstance(one, FSDPModule):
            one.set_gradient_divide_factor(1.0)
            one.set_force_sum_reduction_for_comms(True)  # else the factor is NCCL's to apply: gloo has no such sum
        else:
            # A lambda, for annotations that are text are refused.
            one.register_comm_hook(one.process_group, lambda group, bucket: _sum_bucket(group, bucket))
        _prepared.add(one)


def sum_gradients(model: nn.Module, group: dist.ProcessGroup | DeviceMesh | None) -> None:
    """Add up the gradients of all parameters that no wrapper of the model sums over the group already.

    All ranks call this together. Where some ranks have a gradient of a parameter, the others' counts as zero. Sums are
    taken in fp32 or wider. Raises ValueError for a wrapper that averages over the group, one over a part of it, and
    sparse gradients.
    """
    _check_model(model)
    ranks = _ranks(group)
    summed = set(_summed_by_wrappers(model, ranks))
    weights = [weight for weight in model.parameters() if weight.requires_grad and weight not in summed]
    if len(ranks) == 1 or not weights:
        return
    groups = group.get_all_groups() if isinstance(group, DeviceMesh) else [group]
    for name, weight in model.named_parameters():
        if weight.grad is not None and weight.grad.layout is not torch.strided:
            raise ValueError(f"the gradient of {name} is {weight.grad.layout}: expected a dense one")
    has = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.int32, device=weights[0].device)
    for each in groups:
        dist.all_reduce(has, dist.ReduceOp.MAX, group=each)
    gradients = []
    for weight, somewhere in zip(weights, has.tolist(), strict=True):
        if somewhere:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            gradients.append(weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad)
    for bucket in _buckets(gradients):
        _sum(bucket, groups)


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}: expected a torch.nn.Module")


def _summed_by_wrappers(model: nn.Module, ranks: set[int]) -> Iterator[nn.Parameter]:
    """Parameters whose gradients a wrapper sums over all of these ranks."""
    for module in model.modules():
        if not isinstance(module, DistributedDataParallel | FSDPModule):
            continue
        for weight in module.parameters():
            if isinstance(module, DistributedDataParallel):
                over = _ranks(module.process_group)
            elif isinstance(weight, DTensor):
                over = _ranks(weight.device_mesh)
            else:  # one that fully_shard was told to leave
                continue
            shared = over & ranks
            if len(shared) == 1 < len(ranks):  # with ranks of other packs
                continue
            if shared != ranks:
                raise ValueError(
                    f"model reduces gradients over ranks {sorted(shared)} of {sorted(ranks)}, which share packs: "
                    "expected all of them, or one"
                )
            if module not in _prepared and len(ranks) > 1:
                raise ValueError(f"model has a {type(module).__name__} that averages: call cp.prepare(model) before")
            yield weight


def _ranks(group: dist.ProcessGroup | DeviceMesh | None) -> set[int]:
    """Of all processes. This one alone where none were launched."""
    if isinstance(group, DeviceMesh):
        return set(group.mesh.flatten().tolist())
    return set(dist.get_process_group_ranks(group)) if dist.is_initialized() else {0}


def _sum_bucket(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook of DistributedDataParallel, which then divides by nothing."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients in order, those of one dtype and device that follow each other together."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        alike = bucket and (gradient.dtype, gradient.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and not (alike and sum(one.nbytes for one in bucket) + gradient.nbytes <= _BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def _sum(bucket: Sequence[Tensor], groups: Iterable[dist.ProcessGroup | None]) -> None:
    """In place; without a copy where the bucket is one wide gradient, such as that of an embedding."""
    first = bucket[0]
    wide = torch.promote_types(first.dtype, torch.float32)
    if len(bucket) == 1 and first.dtype == wide and first.is_contiguous():
        flat = first.view(-1)
    else:
        flat = torch.cat([one.reshape(-1).to(wide) for one in bucket])
    for group in groups:
        dist.all_reduce(flat, group=group)
    if flat.data_ptr() != first.data_ptr():
        for one, part in zip(bucket, flat.split([one.numel() for one in bucket]), strict=True):
            one.copy_(part.view_as(one))
