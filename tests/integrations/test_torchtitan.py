"""torchtitan over ranks: losses and gradients of its Trainer as in one process under its own masks."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import flashcp
from tests.packs import relative_error
from tests.ranks import run_ranks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what torchtitan imports
    from torchtitan.config import ConfigManager
    from torchtitan.models.common.attention import VarlenAttention
    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    from flashcp.integrations.torchtitan import FlashCPAttention, Sharing, Trainer, config_registry, with_flashcp
    from flashcp.integrations.torchtitan.machine import FSDP_READS_SPMD_TYPES
    from flashcp.integrations.torchtitan.trainer import check, check_degrees, layers_of
    from tests.integrations.titan import STEPS, WINDOW, Run, configuration, train

LLAMA, QWEN, GPT_OSS = "llama3_debugmodel", "qwen3_debugmodel", "gpt_oss_debugmodel"
LAYERS, PATIENCE_S = 2, 170
TRAINING_AND_VALIDATION = 2
"""What blocks are compiled for, whatever the plan."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("outputs"))


def trained(world_size: int, *case: Any) -> list[Run]:
    """In new processes: under torch 2.14 a second training in one finds the meshes of the first."""
    return run_ranks(train, world_size, *case, timeout_s=PATIENCE_S, fresh=True)


@cache
def alone(folder: str, name: str) -> Run:
    """One process of torchtitan's Trainer."""
    return trained(1, folder, name, "dense")[0]


def same(run: Run, reference: Run, tolerance: float = 1e-4) -> None:
    assert len(run.logs) == STEPS
    for step, (found, wanted) in enumerate(zip(run.logs, reference.logs, strict=True)):
        assert found == pytest.approx(wanted, rel=tolerance), step
    for name, gradient in reference.gradients.items():
        assert relative_error(run.gradients[name], gradient) < tolerance, name
    assert run.validation == pytest.approx(reference.validation, rel=tolerance)


@pytest.mark.parametrize(
    ("name", "attention", "how"),
    [
        (LLAMA, "flex", {}),
        (LLAMA, "varlen", {"checkpointing": "full", "options": {"strategy": "per_document", "exchange": "ring"}}),
        (LLAMA, "flex", {"checkpointing": "selective", "options": {"head_ranks": 2}}),
        (LLAMA, "flex", {"checkpointing": "full", "backend": "aot_eager"}),
        (LLAMA, "flex", {"checkpointing": "selective", "backend": "inductor"}),
        (QWEN, "flex", {"backend": "aot_eager"}),
        (GPT_OSS, "flex", {}),
        (GPT_OSS, "varlen", {"checkpointing": "selective", "backend": "aot_eager"}),
    ],
)
def test_two_ranks(folder: str, name: str, attention: str, how: dict[str, Any]) -> None:
    for run in trained(2, folder, name, attention, 2, how):
        same(run, alone(folder, name), 1e-2 if name == GPT_OSS and "backend" in how else 1e-4)  # experts in bf16
        kinds_of_blocks = 2 if name == GPT_OSS else 1
        assert run.graphs == (TRAINING_AND_VALIDATION * kinds_of_blocks if "backend" in how else 0)
        assert run.calls == LAYERS * (2 if how.get("checkpointing") == "full" else 1)


def test_one_rank(folder: str) -> None:
    same(trained(1, folder, LLAMA, "flex", 1)[0], alone(folder, LLAMA))


@pytest.mark.parametrize(
    "how",
    [
        {"parallelism": {"data_parallel_shard_degree": 2}},
        {"parallelism": {"data_parallel_replicate_degree": 2}, "backend": "aot_eager", "checkpointing": "selective"},
        {"parallelism": {"tensor_parallel_degree": 2}},
    ],
)
def test_four_ranks(folder: str, how: dict[str, Any]) -> None:
    for run in trained(4, folder, LLAMA, "flex", 2, how):
        same(run, alone(folder, LLAMA))


@pytest.mark.skipif(not FSDP_READS_SPMD_TYPES, reason="torch 2.13: torchtitan's spmd_types begin with 2.14")
def test_older_backend(folder: str) -> None:
    how = {"parallelism": {"spmd_backend": "partial_dtensor"}}
    for run in trained(2, folder, LLAMA, "flex", 2, how):
        same(run, alone(folder, LLAMA))


def test_windows_of_both_kinds_of_attention_are_the_layers() -> None:
    for attention in ("flex", "varlen"):
        config = with_flashcp(configuration(GPT_OSS, attention, layers=3))
        found = [one.window for _, one, _, _ in config.model_spec.model.traverse(FlashCPAttention.Config)]
        assert found == [WINDOW, None, WINDOW], attention
        assert layers_of(config.model_spec.model) == [(flashcp.Mask("window", WINDOW), 2), (flashcp.Mask(), 1)]
    assert layers_of(with_flashcp(configuration(LLAMA, "flex")).model_spec.model) is None


def test_the_command_line_takes_torchtitans_names() -> None:
    line = f"--module flashcp.integrations.torchtitan --config {LLAMA} --parallelism.context_parallel_degree 2"
    config = ConfigManager().parse_args(f"{line} --flashcp.exchange ring activation-checkpoint:full".split())
    assert isinstance(config, Trainer.Config)
    assert (config.flashcp.exchange, config.parallelism.context_parallel_degree) == ("ring", 2)
    check(config)
    with pytest.raises(AttributeError, match=r"no configuration 'llama7' in torchtitan's llama3, qwen3, gpt_oss"):
        config_registry.llama7  # noqa: B018


def test_a_wrong_name_is_answered_with_torchtitans() -> None:
    with pytest.raises(ValueError, match="'llama3_debug' not found") as caught:
        ConfigManager().parse_args(["--module", "flashcp.integrations.torchtitan", "--config", "llama3_debug"])
    assert "'llama3_debugmodel'" in str(caught.value)
    assert "'with_flashcp'" not in str(caught.value)
    with pytest.raises(ValueError, match=r"flashcp.strategy='flashpc': expected one of contiguous, "):
        check(with_flashcp(llama3_debugmodel(), strategy="flashpc"))
    with pytest.raises(ValueError, match=r"option='exchnge': expected one of strategy, exchange, "):
        with_flashcp(llama3_debugmodel(), exchnge="ring")


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        (
            {"context_parallel_degree": 4},
            "parallelism.context_parallel_degree=4 on 2 ranks: expected a divisor of them",
        ),
        (
            {"data_parallel_shard_degree": 4},
            "parallelism.context_parallel_degree=1 times data_parallel_shard_degree=4 on 2 ranks: expected as many as",
        ),
    ],
)
def test_degrees_that_ranks_cannot_have_are_refused(degrees: dict[str, int], message: str) -> None:
    parallelism = llama3_debugmodel().parallelism
    check_degrees(replace(parallelism, context_parallel_degree=2), 4)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_degrees(replace(parallelism, **degrees), 2)


def test_a_configuration_stays_as_it_is() -> None:
    config = llama3_debugmodel()
    before = config.to_dict()
    with_flashcp(config, strategy="ring")
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("parallelism", "spmd_backend", "full_dtensor", "spmd_backend='full_dtensor': expected"),
        ("parallelism", "pipeline_parallel_degree", 2, "pipeline_parallel_degree=2 with FlashCP: expected 1"),
        ("parallelism", "context_parallel_load_balancer", "ptrr", "load_balancer='ptrr' with FlashCP: expected None"),
        ("parallelism", "context_parallel_ptrr_mask_key", "x", "mask_key='x' with FlashCP: expected None"),
        ("training", "disable_cuda_graphs", False, "disable_cuda_graphs=False with FlashCP: expected True"),
        ("debug", "spmd_typechecking", True, "spmd_typechecking=True with FlashCP: expected False"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(part: str, field: str, value: Any, message: str) -> None:
    config = with_flashcp(llama3_debugmodel())
    setattr(config, part, replace(getattr(config, part), **{field: value}))
    with pytest.raises(ValueError, match=message):
        check(config)


def test_models_and_attention_that_flashcp_does_not_compute_are_refused() -> None:
    config = llama3_debugmodel()
    ours = with_flashcp(config)
    with pytest.raises(ValueError, match=r"config is Trainer\.Config: expected torchtitan's own"):
        with_flashcp(ours)
    config.model_spec = replace(config.model_spec, name="flux")
    with pytest.raises(ValueError, match=r"model flux: expected one of llama3, qwen3, gpt_oss"):
        with_flashcp(config)
    config = configuration(LLAMA, "varlen")
    config.model_spec.model.layers[1].attention.inner_attention = VarlenAttention.Config(window_size=(-1, -1))
    with pytest.raises(ValueError, match=r"window_size=\(-1, -1\): expected causal"):
        with_flashcp(config)
    ours.model_spec.model.layers[1].attention.inner_attention = VarlenAttention.Config()
    with pytest.raises(ValueError, match=r"layers\.1\.attention\.inner_attention is VarlenAttention: expected FlashCP"):
        check(ours)


def test_attention_uses_or_refuses_what_it_is_handed() -> None:
    layer, x = FlashCPAttention.Config().build(), torch.zeros(1, 2, 1, 8)
    with pytest.raises(ValueError, match="attention_masks is NoneType: expected a Planned"):
        layer(x, x, x, attention_masks=None)
    planned = one_rank().shard({"input": torch.zeros(1, 2), "positions": torch.arange(2)[None]}, torch.zeros(1, 2))[2]
    masks = planned["attention_masks"]
    with pytest.raises(ValueError, match="score_mod=1: expected none, FlashCP does not compute it"):
        layer(x, x, x, attention_masks=masks, score_mod=1)
    with pytest.raises(ValueError, match="a batch of 2 rows: expected one"):
        layer(x.expand(2, -1, -1, -1), x, x, attention_masks=masks)
    with pytest.raises(ValueError, match=r"out_transform=.*: expected none, or that of gpt-oss's sinks"):
        layer(x, x, x, attention_masks=masks, out_transform=torch.add)


@pytest.mark.parametrize("batch", [{"input": 0}, {"input": 0, "positions": 0, "pixel_values": 0}])
def test_inputs_that_nobody_would_share_out_are_refused(batch: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"a batch of {', '.join(batch)}: expected input and positions"):
        one_rank().plan(batch)


def one_rank() -> Sharing:
    return Sharing(flashcp.ContextParallel(), "flashcp", None)
