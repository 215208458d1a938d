"""Trainer and TRL over ranks: losses and gradient norms of their steps as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integrations.trainers import STEPS, Logs, run_sft, run_trainer
from tests.ranks import run_ranks


def same(logs: Logs, reference: Logs) -> None:
    for name in ("loss", "grad_norm", "eval_loss"):
        found, wanted = ([one[name] for one in each if name in one] for each in (logs, reference))
        assert len(found) == (1 if name == "eval_loss" else STEPS)
        assert found == pytest.approx(wanted, rel=1e-4), name


@pytest.mark.parametrize("how", [{}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}])
def test_trainer(tmp_path: Path, how: dict[str, Any]) -> None:
    (one,) = run_ranks(trainer_alone, 1, str(tmp_path), how)
    for logs in run_ranks(run_trainer, 2, str(tmp_path), "llama", True, 1, how):
        same(logs, one)


def test_two_groups_are_two_data_parallel_ranks(tmp_path: Path) -> None:
    two = run_ranks(run_trainer, 2, str(tmp_path), "llama", False, 1, {})
    for logs in run_ranks(run_trainer, 4, str(tmp_path), "llama", True, 2, {}):
        same(logs, two[0])


@pytest.mark.parametrize("how", [{}, {"packing": False, "padding_free": True, "max_length": None}, {"packing": False}])
def test_sft(tmp_path: Path, how: dict[str, Any]) -> None:
    (one,) = run_ranks(sft_alone, 1, str(tmp_path), how)
    for logs in run_ranks(run_sft, 2, str(tmp_path), "qwen2_window", True, how):
        same(logs, one)
        for name in ("mean_token_accuracy", "eval_mean_token_accuracy", "num_tokens"):
            assert [log.get(name) for log in logs] == pytest.approx([log.get(name) for log in one]), name


def trainer_alone(folder: str, how: dict[str, Any]) -> Logs:
    return run_trainer(folder, "llama", False, 1, how)


def sft_alone(folder: str, how: dict[str, Any]) -> Logs:
    return run_sft(folder, "qwen2_window", False, how)
