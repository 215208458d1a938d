"""Accelerate deals each rank batches of its own: here all ranks of a context-parallel group get the same ones."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flashcp.context_parallel import ContextParallel
from flashcp.integrations.transformers.attended import check_attention


class SameBatches(ParallelismConfig):
    """Accelerate's `parallelism_config` for FlashCP: rank r of all reads the batches of group r // cp.world_size.

    To Accelerate all ranks stay data parallel otherwise: DDP and FSDP average gradients over all of them, and none of
    its own context parallelism is switched on. Groups are of ranks that follow each other. Schedulers step once for
    each group, `gather_for_metrics` keeps all parts of a row's values, models are checked as `check_attention` does.
    Raises ValueError where cp's ranks are not such a group.
    """

    def __init__(self, cp: ContextParallel) -> None:
        super().__init__(1, 1, 1, 1, "torch", 1, "deepspeed")
        self.group_size, self.group_rank = cp.world_size, cp.rank
        self._cp, self._checked = cp, WeakSet[nn.Module]()
        self._check()

    def build_device_mesh(self, device_type: str) -> DeviceMesh | None:
        """[groups, ranks of a group]; FSDP shards over both."""
        if not dist.is_initialized():
            return None
        shape = (dist.get_world_size() // self.group_size, self.group_size)
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=("dp_shard", "cp"))
        mesh._flatten("dp_shard_cp")
        return mesh

    def fit(self, accelerator: Accelerator) -> None:
        """Let an accelerator count groups where it counts ranks, and check the models that it prepares."""
        prepare, prepare_model = accelerator.prepare, accelerator.prepare_model
        load, schedule = accelerator.prepare_data_loader, accelerator.prepare_scheduler

        def prepare_all(*given: Any, **how: Any) -> Any:
            made = prepare(*given, **how)
            for one in made if isinstance(made, tuple) else (made,):
                self._check_model(one)
            return made

        def prepare_one(model: Any, device_placement: bool | None = None, evaluation_mode: bool = False) -> Any:
            before = getattr(model, "_is_accelerate_prepared", False)
            made = self._check_model(prepare_model(model, device_placement, evaluation_mode))
            if evaluation_mode and made is model and not before:
                # Otherwise training would take it as it is, without DDP: each rank would train a model of its own.
                made._is_accelerate_prepared = False
            return made

        def prepare_data_loader(*given: Any, **how: Any) -> Any:
            dealt = accelerator.dataloader_config
            for field in ("split_batches", "dispatch_batches"):
                if getattr(dealt, field):
                    raise ValueError(f"{field}=True with context parallelism: expected False, each group reads batches")
            dealt.dispatch_batches = False  # else rank 0 reads iterable data sets and cuts its rows up
            return load(*given, **how)

        def prepare_scheduler(*given: Any, **how: Any) -> Any:
            return _step_for_groups(schedule(*given, **how), accelerator.num_processes // self.group_size)

        for name, function in (
            ("prepare", prepare_all),
            ("prepare_model", prepare_one),
            ("prepare_data_loader", prepare_data_loader),
            ("prepare_scheduler", prepare_scheduler),
            ("gather_for_metrics", _keep_whole_groups(accelerator, self.group_size)),
        ):
            setattr(accelerator, name, function)

    def _check_model(self, made: Any) -> Any:
        if isinstance(made, nn.Module) and made not in self._checked:
            self._checked.add(made)
            check_attention(made, self._cp)
        return made

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        """In place of Accelerate's checks of sizes, which are all 1."""
        self._check()
        self.fit(accelerator)

    def _check(self) -> None:
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        if ranks > 1 and self.group_size == 1:
            raise ValueError(
                f"cp has one rank of {ranks}: expected a ContextParallel that was made after torch.distributed started "
                "(TrainingArguments start it, an Accelerator does)"
            )
        if ranks % self.group_size or rank % self.group_size != self.group_rank:
            raise ValueError(
                f"rank {rank} of {ranks} is rank {self.group_rank} of a context-parallel group of {self.group_size}: "
                "expected groups of ranks that follow each other"
            )


def _step_for_groups(made: Any, groups: int) -> Any:
    """A prepared scheduler that steps once for each group and optimizer step, where Accelerate's does for each rank; as
    Accelerate's no further than its total_steps."""
    if made.split_batches:
        return made
    step, inner = made.step, made.scheduler
    made.split_batches = True  # one step

    def step_for_groups(*given: Any, **how: Any) -> None:
        stepped = made.step_with_optimizer and made.gradient_state.sync_gradients
        for _ in range(groups if stepped else 1):
            if inner._step_count <= getattr(inner, "total_steps", inner._step_count):
                step(*given, **how)

    made.step = step_for_groups
    return made


def _keep_whole_groups(accelerator: Accelerator, ranks: int) -> Any:
    """Of the last batch Accelerate keeps as many values as the data set had rows left, the first of all that ranks
    gave. With context parallelism a row's value has a part on each rank of its group: all of them are kept."""
    gather = accelerator.gather_for_metrics

    def gather_for_metrics(input_data: Any, use_gather_object: bool = False) -> Any:
        state = accelerator.gradient_state
        if use_gather_object or not state.end_of_dataloader or state.remainder <= 0:
            return gather(input_data, use_gather_object)
        rows = state.remainder

        def keep(x: Tensor) -> Tensor:
            """Of x [groups * ranks * values, ...] as many values of each rank as rows of its group are left."""
            of_ranks = x.unflatten(0, (-1, ranks, len(x) // accelerator.num_processes))
            return of_ranks.transpose(1, 2).flatten(0, 1)[:rows].flatten(0, 1)

        return recursively_apply(keep, accelerator.gather(input_data))

    return gather_for_metrics
