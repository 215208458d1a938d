"""Runs small enough for a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flashcp.experiments.cli.main import main
from flashcp.experiments.sweep.results import Row

TINY = ["context=256", "model.layers=1", "model.dim=16", "model.heads=2", "model.kv_heads=2", "loop.steps=2"]
TINY += ["loop.device=cpu", "tracker.wandb=disabled"]


@pytest.fixture
def tiny() -> list[str]:
    """Overrides of a training run that takes no time once its ranks are there."""
    return list(TINY)


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that must be refused: exit code 2, one line, no output, no file. Returns the line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        code = main(arguments)
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1), f"{code}\n{out}\n{err}"
        assert err.startswith("flashcp: error: ")
        assert sorted(tmp_path.rglob("*")) == before
        return err.removeprefix("flashcp: error: ").strip()

    return run


@pytest.fixture
def make_rows() -> Callable[..., list[Row]]:
    """Rows of one run: its step time and its losses."""

    def make(
        provider: str,
        step_ms: float = 10.0,
        losses: tuple[float, ...] = (2.0, 1.0),
        case: str = "stdlib-c8k-n2",
        config: str = "",
        reference: str = "",
        attention_ms: float | None = None,
        exposed_ms: float = 1.0,
    ) -> list[Row]:
        where = (
            "cpu",
            "torch 2, numpy 2",
            "abc",
            "2026-11-23T00:00:00+00:00",
            "measured",
            config or provider,
            reference,
        )
        attention_ms = step_ms / 2 if attention_ms is None else attention_ms
        numbers = {"step_ms": step_ms, "attention_ms": attention_ms, "exposed_exchange_ms": exposed_ms, "wait_ms": 0.5}
        numbers |= {"imbalance": 1.25, "saving": 0.5, "final_loss": losses[-1]}
        rows = [Row(case, provider, name, "ms", None, 0.9 * n, n, 1.1 * n, *where) for name, n in numbers.items()]
        steps = enumerate(losses, start=1)
        return rows + [Row(case, provider, "loss", "nats", step, None, loss, None, *where) for step, loss in steps]

    return make
