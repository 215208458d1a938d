"""Ranks that the launcher starts again go on from the latest checkpoint: the same losses, to the bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from flashcp.experiments.cli.main import main
from tests.processes import torchrun, under_way, wait
from tests.train.test_main import write
from tests.train.test_run import read_rows, small

STEPS = 60


def config(out: Path, **checkpoint: Any) -> dict[str, Any]:
    loop = {"steps": STEPS, "accumulation": 1}
    return small(out, loop=loop, checkpoint={"every": 7, "resume": "latest", **checkpoint})


def losses(out: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_rows(out)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    """The losses of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    with under_way([*torchrun(), write(folder, config(folder / "run"))], folder) as job:
        job.gone(120.0)
        assert job.launcher.returncode == 0
    return losses(folder / "run")


@pytest.mark.parametrize("kept", [{}, {"asynchronous": True}])
def test_the_losses_of_a_run_whose_ranks_were_killed(
    kept: dict[str, Any], undisturbed: list[tuple[int, float]], tmp_path: Path
) -> None:
    command = [*torchrun("--max-restarts=2"), write(tmp_path, config(tmp_path / "run", **kept))]
    with under_way(command, tmp_path) as job:
        for killed in (1, 0):
            done = job.steps()
            wait(lambda done=done: job.steps() > done + 9, 60.0)  # type: ignore[misc]
            os.kill(job.ranks()[killed], signal.SIGKILL)
        job.gone(120.0)
        assert job.launcher.returncode == 0, job.log.read_text()[-3000:]
    assert losses(tmp_path / "run") == undisturbed
    assert len(undisturbed) == STEPS


def test_restarts_without_checkpoints_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "max_restarts=2", "checkpoint.every=5"]) == 2
    error = capsys.readouterr().err
    assert "max_restarts=2 with checkpoint.every=5 and checkpoint.resume=never: expected" in error
    assert error.count("\n") == 1
