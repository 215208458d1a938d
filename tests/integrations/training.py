"""Loss and gradients of a model over ranks, and of the same documents one by one in one process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import flashcp
from flashcp.integrations.transformers import Collator, install
from tests.integrations.families import VOCABULARY, make_model

LENGTHS = (37, 5, 1, 64, 21)
PATIENT_S = 280.0
"""For what is compiled, on a machine with other work too."""

Answer = tuple[float, dict[str, Tensor]]
"""The loss, and every parameter's gradient."""


def documents(seed: int = 0, lengths: Sequence[int] = LENGTHS) -> list[dict[str, list[int]]]:
    """Examples of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()} for length in lengths]


@cache
def alone(family: str, windows: int = 1, lengths: Sequence[int] = LENGTHS, bf16: bool = False) -> Answer:
    """Every document by itself: packs of gpt-oss see each other's documents in Transformers 5.24 but under varlen
    kernels, for its model does not tell the mask where documents begin."""
    model = make_model(family, "eager")
    given = [torch.tensor([one["input_ids"]]) for seed in range(windows) for one in documents(seed, lengths)]
    labels = sum(ids.shape[1] - 1 for ids in given)
    with torch.autocast("cpu", enabled=bf16, dtype=torch.bfloat16):
        loss = sum(model(ids, labels=ids, use_cache=False, num_items_in_batch=labels).loss for ids in given)
    loss.backward()  # type: ignore[union-attr]
    return loss.item(), gradients_of(model)


def over_ranks(family: str, groups: int = 1, head_ranks: int = 1, bf16: bool = False, **collator: Any) -> Answer | None:
    """The same over all ranks, each group of them with a window of its own, on rank 0."""
    lengths = collator.pop("lengths", LENGTHS)
    cp = flashcp.ContextParallel(my_group(groups), head_ranks=head_ranks)
    mine = dist.get_rank() // cp.world_size
    checkpointing, wrapped = collator.pop("checkpointing", False), collator.pop("wrapped", "")
    compiled = collator.pop("compiled", "")
    model = make_model(family, install(cp))
    if checkpointing:
        model.gradient_checkpointing_enable()
    collate = Collator(cp, config=model.config, **collator)
    trained: Any = DistributedDataParallel(model) if wrapped == "ddp" else model
    if compiled == "layers":
        torch._dynamo.reset()
        for layer in model.model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
    if wrapped == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (*model.model.layers, model):
            fully_shard(layer, mesh=mesh)
    if compiled not in ("", "layers"):
        torch._dynamo.reset()
        trained = torch.compile(trained, backend=compiled)
    averaged = bool(wrapped)
    for used in (lengths[::-1], lengths) if compiled else (lengths,):  # the graph of one plan computes the next
        model.zero_grad()
        batch = collate(documents(mine, used))
        batch["num_items_in_batch"] = batch["num_items_in_batch"] * groups
        with torch.autocast("cpu", enabled=bf16, dtype=torch.bfloat16):
            loss = trained(**batch).loss
        (loss * dist.get_world_size() if averaged else loss).backward()
    gradients = gradients_of(model)
    for summed in (loss := loss.detach(), *([] if averaged else gradients.values())):
        dist.all_reduce(summed)
    return (float(loss), gradients) if dist.get_rank() == 0 else None


def probe(family: str, head_ranks: int) -> tuple[float, float]:
    """Where one document's tokens change: the most that a logit of the others moves, and the least that a row of its
    own does."""
    cp = flashcp.ContextParallel(head_ranks=head_ranks)
    model = make_model(family, install(cp))
    collate, changed, found = Collator(cp, config=model.config), 3, []
    for seed in (0, 1):
        examples = documents()
        examples[changed] = documents(seed)[changed]
        batch = collate(examples)
        with torch.no_grad():
            found.append(cp.unshard(model(**batch).logits[0], batch["plan"]))
    moved = [float(x) for x in (found[0] - found[1]).abs().amax(1)]
    first, past = sum(LENGTHS[:changed]), sum(LENGTHS[: changed + 1])
    return max(moved[:first] + moved[past:]), min(moved[first:past])


def count_graphs(family: str) -> tuple[list[int], list[str]]:
    """How many graphs a model has after each of some windows, two of one length, then of two others, and each thing
    that ended a graph."""
    cp = flashcp.ContextParallel()
    model = make_model(family, install(cp))
    collate, counter, counts = Collator(cp, config=model.config), CompileCounter(), []
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend=counter)
    for seed, lengths in enumerate((LENGTHS, LENGTHS[::-1], (41, 30), (3, 50))):
        batch = collate(documents(seed, lengths))
        batch["plan"] = flashcp.ShardingPlan.from_json(batch["plan"].to_json())  # as one that no collator made
        compiled(**batch)
        counts.append(counter.frame_count)
    return counts, list(counters["graph_break"])


def my_group(groups: int) -> dist.ProcessGroup:
    """Of this rank, of so many that share out all ranks."""
    size = dist.get_world_size() // groups
    made = [dist.new_group(list(range(first, first + size))) for first in range(0, dist.get_world_size(), size)]
    return made[dist.get_rank() // size]


def differences(answer: Answer, reference: Answer) -> dict[str, float]:
    """Of the loss and of each gradient, relative; one that is nothing but rounding (of a bias of keys, which moves all
    scores of a row alike) is measured against all of them."""
    (loss, gradients), (true_loss, true) = answer, reference
    assert gradients.keys() == true.keys()
    least = 1e-4 * torch.stack([gradient.norm() for gradient in true.values()]).norm()
    errors = {
        name: float((gradients[name] - gradient).norm() / gradient.norm().clamp(min=least))
        for name, gradient in true.items()
    }
    return {"loss": abs(loss - true_loss) / true_loss, **errors}


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Of all parameters, zeros where there is none."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found
