"""Trainer and TRL over ranks: losses and gradient norms of their steps as in one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.trainers import (
    STEPS,
    Logs,
    announced,
    parallelize_twice,
    predict,
    refusals,
    run_loop,
    run_sft,
    run_trainer,
    scheduled,
)
from tests.integrations.training import PATIENT_S
from tests.ranks import run_ranks


def same(logs: Logs, reference: Logs, limit: float = 1e-4) -> None:
    for name in ("loss", "grad_norm", "eval_loss"):
        found, wanted = ([one[name] for one in each if name in one] for each in (logs, reference))
        assert len(found) == (1 if name == "eval_loss" else STEPS)
        assert found == pytest.approx(wanted, rel=limit), name


ACCUMULATED = {"gradient_accumulation_steps": 2, "activation_checkpointing": True}
FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2}}
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


MEAN = {"of_a_mean": True, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    "how",
    [
        {},
        ACCUMULATED,
        {"bf16": True},
        {"streamed": True},
        FSDP2,
        {**FSDP2, **ACCUMULATED},
        COMPILED,
        MEAN,
        {"made_anew": True},
        {"overridden": "watched"},
        {"overridden": "positional", **MEAN},
        {"evaluated": "first"},
        {"loss_of": "weighted"},
        {"loss_of": "summed"},
    ],
)
def test_trainer(tmp_path: Path, how: dict[str, Any]) -> None:
    one_rank = {name: value for name, value in how.items() if name not in {**FSDP2, **COMPILED}}
    (one,) = run_ranks(trainer_alone, 1, str(tmp_path), one_rank)
    for logs in run_ranks(run_trainer, 2, str(tmp_path), "llama", True, 1, how, timeout_s=PATIENT_S):
        same(logs, one, 2e-2 if "bf16" in how else 1e-4)


@pytest.mark.parametrize("how", [{}, FSDP2])
def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path, how: dict[str, Any]) -> None:
    (one,) = run_ranks(trainer_alone, 1, str(tmp_path), {})
    saved = {"save_strategy": "steps", "save_steps": STEPS // 2, **how}
    run_ranks(run_trainer, 2, str(tmp_path), "llama", True, 1, saved)
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    for logs in run_ranks(run_trainer, 2, str(tmp_path), "llama", True, 1, {"resume": True, **how}):
        same(logs, one)


@pytest.mark.parametrize("how", [{}, FSDP2])
def test_two_groups_are_two_data_parallel_ranks(tmp_path: Path, how: dict[str, Any]) -> None:
    two = run_ranks(run_trainer, 2, str(tmp_path), "llama", False, 1, {})
    for logs in run_ranks(run_trainer, 4, str(tmp_path), "llama", True, 2, how):
        same(logs, two[0])


@pytest.mark.parametrize(
    "how", [{}, {"packing": False, "padding_free": True, "max_length": None}, {"packing": False}, {"lora": True}]
)
def test_sft(tmp_path: Path, how: dict[str, Any]) -> None:
    (one,) = run_ranks(sft_alone, 1, str(tmp_path), how)
    for logs in run_ranks(run_sft, 2, str(tmp_path), "qwen2_window", True, how):
        same(logs, one)
        for name in ("mean_token_accuracy", "eval_mean_token_accuracy", "num_tokens"):
            assert [log.get(name) for log in logs] == pytest.approx([log.get(name) for log in one]), name


def test_evaluation_is_the_same_whatever_was_accumulated(tmp_path: Path) -> None:
    """Of experts, whose auxiliary loss TRL takes in parts."""
    how = {"learning_rate": 0.0, "max_steps": 1, "eval_steps": 1}
    one, two = (
        run_ranks(run_sft, 2, str(tmp_path), "mixtral", True, {**how, "gradient_accumulation_steps": count})[0]
        for count in (1, 2)
    )
    (wanted,), (found,) = ([log["eval_loss"] for log in logs if "eval_loss" in log] for logs in (one, two))
    assert found == pytest.approx(wanted, rel=1e-6)
    assert any(log.get("eval_aux_loss", 0) > 0 for log in one)


def test_predictions_are_of_the_same_rows(tmp_path: Path) -> None:
    (one,) = run_ranks(predict, 1, str(tmp_path), False)
    for found in run_ranks(predict, 2, str(tmp_path), True):
        assert [label for label, _ in found] == [label for label, _ in one]
        assert [logit for _, logit in found] == pytest.approx([logit for _, logit in one], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("how", [{}, {"sharded": True}, {"streamed": True}])
def test_accelerates_own_loop(how: dict[str, bool]) -> None:
    (losses, norms), *_ = run_ranks(run_loop, 1, False)
    for found_losses, found_norms in run_ranks(run_loop, 2, True, *how):
        assert found_losses == pytest.approx(losses, rel=1e-4)
        assert found_norms == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("replaced", "the model did not attend through FlashCP: 0 of 2 layers did, its attention is 'sdpa'"),
        ("dispatched", "dispatch_batches=True with context parallelism: expected False, each group reads batches"),
    ],
)
def test_a_loop_is_checked(how: str, message: str) -> None:
    for said in run_ranks(loop_refused, 2, how):
        assert said.startswith(message)


def loop_refused(how: str) -> str:
    with pytest.raises(ValueError, match=r"through FlashCP|context parallelism") as caught:
        run_loop(True, how)
    return str(caught.value)


@pytest.mark.parametrize(("ranks", "groups"), [(2, 1), (4, 2)])
def test_schedulers_step_once_for_each_group(ranks: int, groups: int) -> None:
    for rates in run_ranks(scheduled, ranks, groups):
        assert rates == pytest.approx([(8 - groups * step) / 8 for step in range(5)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices=False with context parallelism: exp"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 with context parallelism: expected None, for a rank's"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 with context parallelism: expected 0.0"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config.split_batches=True with context paralle"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config.dispatch_batches=True with context p"),
    ],
)
def test_arguments_under_which_losses_are_not_the_windows(changes: Any, message: str, tmp_path: Path) -> None:
    for said in run_ranks(refused, 2, str(tmp_path), changes):
        assert said.startswith(message)


def refused(folder: str, changes: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match="context parallelism") as caught:
        run_trainer(folder, "llama", True, 1, changes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"classifies": True}, "LlamaForTokenClassification has ForTokenClassification: expected the loss of causal"),
        ({"own_loss": True}, "XLMWithLMHeadModel has a loss of its own: expected the loss of causal language models"),
        ({"overridden": "own"}, "OfItsOwn.compute_loss does not call super().compute_loss: expected a compute_loss_"),
        ({"overridden": "own", "evaluated": True}, "OfItsOwn.compute_loss does not call super().compute_loss: "),
        ({"overridden": "in training"}, "RightInTraining.compute_loss does not call super().compute_loss: expected"),
        ({"loss_of": "partly_mean"}, "compute_loss_func gave "),
        ({"overridden": "outputs"}, "OutputsAlone.compute_loss leaves out the loss of super().compute_loss: expected"),
        ({"loss_of": "mean"}, "compute_loss_func gave "),
        (
            {"loss_of": "shifted"},
            "compute_loss_func leaves out the label of a rank's first row: expected a compute_loss",
        ),
        ({"replaced": True}, "the model did not attend through FlashCP: 0 of 2 layers did, its attention is 'sdpa'"),
        ({"replaced": True, "evaluated": True}, "the model did not attend through FlashCP: 0 of 2 layers did"),
    ],
)
def test_models_that_would_be_trained_wrongly(how: Any, message: str, tmp_path: Path) -> None:
    for said in run_ranks(model_refused, 2, str(tmp_path), how):
        assert said.startswith(message)


def model_refused(folder: str, how: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match=r"the loss of causal|through FlashCP|compute_loss_func") as caught:
        run_trainer(folder, "llama", True, 1, how)
    return str(caught.value)


def test_what_is_no_trainer_and_one_that_has_trained_are_refused(tmp_path: Path) -> None:
    (said,) = run_ranks(refusals, 1, str(tmp_path))
    assert [one.split(": ")[0] for one in said] == [
        "trainer is a ContextParallel",
        "trainer is a LlamaForCausalLM",
        "cp is a str",
        "cp is the class ContextParallel",
        "the trainer is at step 3",
    ]


def test_the_first_rank_says_over_how_many_the_model_attends(tmp_path: Path) -> None:
    first, second = run_ranks(announced, 2, str(tmp_path))
    assert first.startswith("FlashCP: ContextParallel(rank 0 of 2, head_ranks=1, exchange=exact")
    assert first.endswith("1 group of ranks, strategy=per_document\n")
    assert not second


def test_arguments_serve_one_trainer(tmp_path: Path) -> None:
    for said in run_ranks(again, 2, str(tmp_path)):
        assert said == "parallelize was called with these TrainingArguments before: make new ones for each Trainer"


def again(folder: str) -> str:
    with pytest.raises(ValueError, match="parallelize") as caught:
        parallelize_twice(folder)
    return str(caught.value)


def test_a_context_parallel_made_too_early_is_refused(tmp_path: Path) -> None:
    for said in run_ranks(too_early, 2, str(tmp_path)):
        assert said.startswith("cp has one rank of 2: expected a ContextParallel that was made after")


def too_early(folder: str) -> str:
    with pytest.raises(ValueError, match="cp has one rank") as caught:
        run_trainer(folder, "llama", True, 2, {})
    return str(caught.value)


def trainer_alone(folder: str, how: dict[str, Any]) -> Logs:
    return run_trainer(folder, "llama", False, 1, how)


def sft_alone(folder: str, how: dict[str, Any]) -> Logs:
    return run_sft(folder, "qwen2_window", False, how)
