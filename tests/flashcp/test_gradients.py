"""prepare and sum_gradients: every gradient on every rank is that of one process, whatever wraps the model."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import flashcp
from flashcp.comm.choice import Connection
from flashcp.comm.transport import Alone
from flashcp.gradients import sum_gradients
from flashcp.sharding.plan import ShardingPlan
from tests.packs import relative_error
from tests.ranks import run_cases, run_ranks

PACKS = ((30, 7, 1, 45), (1,))  # of the second only one rank has rows
DIM, HEADS = 16, 4


class Layer(nn.Module):
    """Attention with sinks, a weight that one rank may use alone, one that nobody uses, one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.out = nn.Linear(DIM, DIM)
        self.rare, self.never = nn.Parameter(torch.randn(DIM)), nn.Parameter(torch.randn(3))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor, cp: flashcp.ContextParallel, plan: ShardingPlan, use_rare: bool) -> Tensor:
        q, k, v = self.qkv(x).unflatten(1, (3, HEADS, -1)).unbind(1)
        loss = self.out(cp.attention(q, k, v, plan, sinks=self.sinks).flatten(1)).square().sum()
        return loss + 3 * self.rare.sum() if use_rare else loss


def rows(number: int) -> Tensor:
    return torch.randn(sum(PACKS[number]), DIM, generator=torch.Generator().manual_seed(number))


def alone(packs: int) -> dict[str, Tensor]:
    """Gradients of one process that computes all packs."""
    model, cp = Layer(), flashcp.ContextParallel()
    for number in range(packs):
        (model(rows(number), cp, flashcp.plan(PACKS[number], 1), False) / 83).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def wrapped(model: nn.Module, how: str, mesh: DeviceMesh | None) -> nn.Module:
    """mesh: dp x cp."""
    if how == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    if how == "ddp over dp":
        return DistributedDataParallel(model, process_group=mesh["dp"].get_group(), find_unused_parameters=True)
    if how == "fsdp":
        fully_shard(model.qkv)
        return fully_shard(model)
    if how == "hsdp":
        return fully_shard(model, mesh=mesh)
    return fully_shard(model, mesh=mesh["dp"]) if how == "fsdp over dp" else model


def on_ranks(how: str, replicas: int, head_ranks: int = 1) -> dict[str, Tensor]:
    """Each replica has a pack. Where nothing wraps the model, the last rank alone uses `rare`."""
    size = dist.get_world_size() // replicas
    mesh = init_device_mesh("cpu", (replicas, size), mesh_dim_names=("dp", "cp"))
    group = init_device_mesh("cpu", (size // head_ranks, head_ranks)) if head_ranks > 1 else mesh["cp"]
    cp = flashcp.ContextParallel(group, timeout_s=20)
    plan = flashcp.plan(PACKS[mesh.get_local_rank("dp")], cp.holders, "per_document")
    model = wrapped(Layer(), how, mesh)
    if how != "plain":
        cp.prepare(model)
        cp.prepare(model)
    x = cp.shard(rows(mesh.get_local_rank("dp")), plan)
    use_rare = how == "plain" and cp.rank == cp.world_size - 1
    (model(x, cp, plan, use_rare) / 83).backward()
    cp.sum_gradients(model)  # what a wrapper has summed is not summed again
    named = model.module.named_parameters() if isinstance(model, DistributedDataParallel) else model.named_parameters()
    return {name: whole(weight.grad) for name, weight in named if weight.grad is not None}


CASES = {
    2: [("plain", 1), ("ddp", 1), ("fsdp", 1), ("hsdp", 1)],
    4: [("plain", 1, 2), ("ddp", 2), ("fsdp", 2), ("hsdp", 2), ("ddp over dp", 2), ("fsdp over dp", 2)],
}


@pytest.mark.parametrize("world_size", list(CASES))
def test_gradients_are_those_of_one_process(world_size: int) -> None:
    for case, ranks in zip(CASES[world_size], run_cases(on_ranks, world_size, CASES[world_size]), strict=True):
        how, replicas = case[:2]
        for gradients in ranks:
            for name, gradient in alone(replicas).items():
                assert relative_error(gradients[name], gradient) < 1e-6, (case, name)
            if how == "plain":
                assert torch.allclose(gradients["rare"], torch.full((DIM,), 3 / 83))
                assert not gradients.keys() & {"never", "frozen"}


def refused() -> None:
    cp = flashcp.ContextParallel(timeout_s=20)
    part = dist.new_group([0, 1])  # of the three that share packs
    averaging, inside = DistributedDataParallel(nn.Linear(2, 2)), fully_shard(nn.Linear(2, 2))
    for model in (averaging, inside):
        with pytest.raises(ValueError, match="that averages: call cp"):
            cp.sum_gradients(model)
    sparse = nn.Embedding(4, 2, sparse=True)
    sparse(torch.zeros(1, dtype=torch.int64)).sum().backward()
    with pytest.raises(ValueError, match=r"the gradient of weight is torch\.sparse_coo: expected a dense"):
        cp.sum_gradients(sparse)
    if cp.rank < 2:
        over_part = DistributedDataParallel(nn.Linear(2, 2), process_group=part)
        with pytest.raises(ValueError, match=r"over ranks \[0, 1\] of \[0, 1, 2\], which share packs: expected all"):
            sum_gradients(over_part, None)


def test_what_would_be_summed_wrongly_is_refused() -> None:
    run_ranks(refused, 3)
    cp = flashcp.ContextParallel()
    cp.sum_gradients(nn.Linear(1, 1))  # one rank alone
    with pytest.raises(ValueError, match="model is a Linear without such modules: expected DistributedDataParallel or"):
        cp.prepare(nn.Linear(1, 1))
    alone = flashcp.ContextParallel(Connection(Alone(), None, "one rank alone"))
    with pytest.raises(ValueError, match="sum_gradients over a Connection: expected a ContextParallel over a group"):
        alone.sum_gradients(nn.Linear(1, 1))
