"""torchtitan's Trainer and Validator, whose batches FlashCP shares out in place of its own context parallelism."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.components import validate
from torchtitan.config.override import derive
from torchtitan.distributed import ParallelDims, activation_checkpoint
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention, VarlenAttention
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer as TorchtitanTrainer

from flashcp.context_parallel import TIMEOUT_S, ContextParallel
from flashcp.integrations.torchtitan.attention import FlashCPAttention
from flashcp.integrations.torchtitan.machine import FSDP_READS_SPMD_TYPES
from flashcp.integrations.torchtitan.sharing import Sharing
from flashcp.operator import attention
from flashcp.sharding.mask import Mask, count_layers
from flashcp.sharding.strategies import STRATEGIES
from flashcp.sharding.values import check_choice


@dataclass(kw_only=True, slots=True)
class FlashCPConfig:
    """How packs are planned, and the arguments of `flashcp.ContextParallel`."""

    strategy: str = "flashcp"
    """Who holds which rows, as for flashcp.plan"""
    exchange: str = "exact"
    """How keys and values travel"""
    overlap: str = "auto"
    """What is computed while they do"""
    attention: str = "auto"
    """The kernels"""
    transport: str = "auto"
    """What carries rows"""
    backward: str = "keep"
    """Whether received rows are kept for the backward pass, or brought again (refetch)"""
    gradient_wire: str = "auto"
    """What gradients of keys and values travel in"""
    verify_rows: bool = False
    """Whether checksums travel beside rows, and rows that differ are an error"""
    head_ranks: int = 1
    """Ranks that follow each other and share out the heads of the same rows"""
    timeout_s: float = TIMEOUT_S
    """Bound on every wait for another rank, seconds"""


class SelectiveAC(activation_checkpoint.SelectiveAC):
    """torchtitan's, which keeps what attention computed: recomputing it would bring rows a second time."""

    @dataclass(kw_only=True, slots=True)
    class Config(activation_checkpoint.SelectiveAC.Config):
        pass

    def get_save_ops(self) -> set[Any]:
        return {*super().get_save_ops(), attention}


class Validator(validate.Validator):
    """torchtitan's, on the ranks' rows of each batch. Its trainer sets `sharing`."""

    @dataclass(kw_only=True, slots=True)
    class Config(validate.Validator.Config):
        pass

    sharing: Sharing

    def post_dataloading_process(
        self, input_dict: dict[str, Any], labels: Tensor, model_parts: list[Any]
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        return self.sharing.shard(input_dict, labels)


class Trainer(TorchtitanTrainer):
    """torchtitan's, with attention over the ranks of its mesh's `cp` axis.

    Raises ValueError for settings under which torchtitan would share out batches itself, or FlashCP cannot compute.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TorchtitanTrainer.Config):
        flashcp: FlashCPConfig = field(default_factory=FlashCPConfig)

    sharing: Sharing

    def __init__(self, config: Config) -> None:
        check(config)
        super().__init__(_with_own_parts(config))
        if config.validator.enable:
            self.validator.sharing = self.sharing
        # All ranks hear of rows that did not come before any of them takes a step.
        self.optimizers.register_step_pre_hook(lambda *_: self.sharing.cp.synchronize())
        part: nn.Module
        for part in self.model_parts:
            if isinstance(part, FSDPModule):
                self.sharing.cp.prepare(part)  # gloo cannot sum as torchtitan asks

    def init_distributed(self) -> ParallelDims:
        """As torchtitan's; the ranks of the cp axis join here. One rank alone where its degree is 1."""
        ranks = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
        check_degrees(self.config.parallelism, ranks)
        dims = super().init_distributed()
        how = {name: getattr(self.config.flashcp, name) for name in FlashCPConfig.__dataclass_fields__}
        strategy = how.pop("strategy")
        group = dims.get_optional_mesh("cp", include_singleton_axes=True).get_group()
        self.sharing = Sharing(ContextParallel(group, **how), strategy, layers_of(self.config.model_spec.model))
        logger.info(f"FlashCP: {self.sharing.cp}, strategy={strategy}")
        return dims

    def batch_generator(self, data_iterable: Iterable[Any]) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Plans are made here, where positions are on the CPU still."""
        for batch, labels in super().batch_generator(data_iterable):
            yield {**batch, "plan": self.sharing.plan(batch)}, labels

    def post_dataloading_process(
        self, input_dict: dict[str, Any], labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        inputs, labels, kwargs = self.sharing.shard(input_dict, labels, input_dict.get("plan"))
        self.ntokens_seen += labels.numel()
        return inputs, labels, kwargs


def layers_of(model: Any) -> list[tuple[Mask, int]] | None:
    """The layer mix of a model's configuration, as `flashcp.plan(layers=)` takes it; None where all are causal."""
    windows = [found.window for _, found, _, _ in model.traverse(FlashCPAttention.Config)]
    return count_layers(Mask() if window is None else Mask("window", window) for window in windows)


def check_degrees(parallelism: Any, ranks: int) -> None:
    """Raise ValueError where as many ranks cannot have these degrees, of which sharding may be -1, for what is left."""
    axes = (
        "context_parallel",
        "data_parallel_replicate",
        "data_parallel_shard",
        "tensor_parallel",
        "pipeline_parallel",
    )
    degrees = {f"{axis}_degree": getattr(parallelism, f"{axis}_degree") for axis in axes}
    open_ended = degrees["data_parallel_shard_degree"] == -1
    if open_ended:
        del degrees["data_parallel_shard_degree"]
    needed = prod(degrees.values())
    if needed < 1 or (ranks % needed if open_ended else ranks != needed):
        named = [f"{name}={degree}" for name, degree in degrees.items() if degree != 1 or name.startswith("context")]
        said = f"parallelism.{' times '.join(named)} on {ranks} ranks"
        raise ValueError(f"{said}: expected {'a divisor of them' if open_ended else 'as many as the product'}")


def check(config: Trainer.Config) -> None:
    """Raise ValueError for settings with which a run would not be what one process computes."""
    parallelism = config.parallelism
    for name, value, legal, why in (
        ("parallelism.pipeline_parallel_degree", parallelism.pipeline_parallel_degree, 1, "stages were not tried"),
        ("parallelism.context_parallel_load_balancer", parallelism.context_parallel_load_balancer, None,
         "flashcp.strategy shares out rows"),
        ("parallelism.context_parallel_ptrr_mask_key", parallelism.context_parallel_ptrr_mask_key, None, "as above"),
        ("training.disable_cuda_graphs", config.training.disable_cuda_graphs, True, "each batch has its plan"),
        ("debug.spmd_typechecking", config.debug.spmd_typechecking, False, "attention has no SPMD type"),
    ):  # fmt: skip
        if value != legal:
            raise ValueError(f"{name}={value!r} with FlashCP: expected {legal!r}, {why}")
    check_choice("flashcp.strategy", config.flashcp.strategy, STRATEGIES)
    backends = ("partial_dtensor", "spmd_types") if FSDP_READS_SPMD_TYPES else ("partial_dtensor",)
    check_choice(f"with torch {torch.__version__} parallelism.spmd_backend", parallelism.spmd_backend, backends)
    for theirs in (FlexAttention, VarlenAttention, ScaledDotProductAttention):
        for where, *_ in config.model_spec.model.traverse(theirs.Config):
            raise ValueError(f"{where} is {theirs.__name__}: expected FlashCPAttention, as with_flashcp puts it there")
    if config.validator.enable and type(config.validator) not in (validate.Validator.Config, Validator.Config):
        raise ValueError(f"validator is {type(config.validator).__qualname__}: expected torchtitan's, or flashcp's")


def _with_own_parts(config: Trainer.Config) -> Trainer.Config:
    """The configuration with our checkpointing and validator where torchtitan's are asked for."""
    spec = config.model_spec
    ours: dict[str, Any] = {"model_spec": replace(spec, parallelize_fn=partial(_parallelize, spec.parallelize_fn))}
    if type(config.activation_checkpoint) is activation_checkpoint.SelectiveAC.Config:
        ours["activation_checkpoint"] = derive(config.activation_checkpoint, SelectiveAC.Config)
    if type(config.validator) is validate.Validator.Config:
        ours["validator"] = derive(config.validator, Validator.Config)
    return replace(config, **ours)


def _parallelize(theirs: Callable[..., Any], model: Any, *, parallel_dims: ParallelDims, **rest: Any) -> Any:
    """A model's own function. Under partial_dtensor it would wrap attention where it sees a cp axis; FSDP shards over
    the same ranks when they are said to be data parallel."""
    if parallel_dims.spmd_backend == "partial_dtensor" and parallel_dims.cp_enabled:
        parallel_dims = copy(parallel_dims)
        parallel_dims.dp_shard, parallel_dims.cp = parallel_dims.dp_shard * parallel_dims.cp, 1
    return theirs(model, parallel_dims=parallel_dims, **rest)
