"""Trainer and TRL over ranks: losses and gradient norms of their steps as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integrations.trainers import STEPS, run_trainer
from tests.ranks import run_ranks


def same(logs: list[dict[str, float]], reference: list[dict[str, float]]) -> None:
    for name in ("loss", "grad_norm", "eval_loss"):
        found, wanted = ([one[name] for one in each if name in one] for each in (logs, reference))
        assert len(found) == (1 if name == "eval_loss" else STEPS)
        assert found == pytest.approx(wanted, rel=1e-4), name


@pytest.mark.parametrize("how", [{}, {"gradient_accumulation_steps": 2}])
def test_trainer(tmp_path: Path, how: dict[str, Any]) -> None:
    (one,) = run_ranks(run_alone, 1, str(tmp_path), how)
    for logs in run_ranks(run, 2, str(tmp_path), how):
        same(logs, one)


def run(folder: str, how: dict[str, Any]) -> Any:
    return run_trainer(folder, **how)


def run_alone(folder: str, how: dict[str, Any]) -> Any:
    return run_trainer(folder, over_ranks=False, **how)
