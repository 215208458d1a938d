"""A configuration of torchtitan's made one of FlashCP's."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

from torchtitan.config.override import derive
from torchtitan.models.common.attention import FlexAttention, VarlenAttention
from torchtitan.trainer import Trainer as TorchtitanTrainer

from flashcp.integrations.torchtitan.attention import FlashCPAttention
from flashcp.integrations.torchtitan.machine import FSDP_READS_SPMD_TYPES
from flashcp.integrations.torchtitan.trainer import FlashCPConfig, Trainer
from flashcp.sharding.values import check_choice

MODELS = ("llama3", "qwen3", "gpt_oss")


def with_flashcp(config: TorchtitanTrainer.Config, **options: Any) -> Trainer.Config:
    """The same training run with attention over `parallelism.context_parallel_degree` ranks; config stays as it is.

    options: of FlashCPConfig, such as strategy, exchange, head_ranks; on the command line `--flashcp.exchange`.
    With torch 2.13, whose FSDP does not read spmd_types, `parallelism.spmd_backend` becomes partial_dtensor.
    Raises ValueError for options that there are not, models that FlashCP was not tried with and attention that it does
    not compute.
    """
    for name in options:
        check_choice("option", name, FlashCPConfig.__dataclass_fields__)
    spec = config.model_spec
    if type(config) is not TorchtitanTrainer.Config:
        raise ValueError(f"config is {type(config).__qualname__}: expected torchtitan's own Trainer.Config")
    if spec is None or spec.name not in MODELS:
        raise ValueError(f"model {spec and spec.name}: expected one of {', '.join(MODELS)}")
    spec = replace(spec, model=deepcopy(spec.model))
    backend = config.parallelism.spmd_backend if FSDP_READS_SPMD_TYPES else "partial_dtensor"
    for theirs in (FlexAttention.Config, VarlenAttention.Config):
        for where, found, layer, field in list(spec.model.traverse(theirs)):
            setattr(layer, field, FlashCPAttention.Config(window=_window(where, found, layer)))
    return derive(
        config,
        Trainer.Config,
        model_spec=spec,
        flashcp=FlashCPConfig(**options),
        parallelism=replace(config.parallelism, context_parallel_load_balancer=None, spmd_backend=backend),
        training=replace(config.training, disable_cuda_graphs=True),
    )


def _window(where: str, found: Any, layer: Any) -> int | None:
    """Keys that a row of the layer sees at most. gpt-oss says it beside FlexAttention, whose mask would hold it."""
    if isinstance(found, FlexAttention.Config):
        return getattr(layer, "sliding_window_size", None)
    left, right = found.window_size
    if right != 0:
        raise ValueError(f"{where}.window_size={found.window_size}: expected causal attention, (left, 0)")
    return None if left == -1 else left + 1
