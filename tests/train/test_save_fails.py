"""A checkpoint that cannot be written ends the run with one clear line, the earlier ones whole, the log whole.

A file that may not grow stands for a full disk: the write fails in the same place, and no root is needed.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flashcp.experiments.cli.compose import compose
from flashcp.experiments.cli.launch import launch
from flashcp.experiments.cli.train import read_run
from flashcp.train.checkpoint import CheckpointError
from tests.ranks import run_ranks
from tests.train.test_run import read_rows, small, train

TINY = ["model.layers=1", "model.dim=64", "model.heads=4", "model.kv_heads=2", "tracker.wandb=disabled", "context=512"]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process and of those it starts may grow beyond."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_full_disk_is_one_line_that_names_the_checkpoint(world_size: int, tmp_path: Path) -> None:
    words = [*TINY, f"world_size={world_size}", "loop.steps=4", "checkpoint.every=2"]
    run = read_run(compose("train", words)).placed(str(tmp_path / "out"), "", ())
    with files_of_at_most(200_000):
        outcome = launch(run, watch=lambda: None)
    assert outcome.code == 1
    start, _, cause = outcome.error.partition("/out/checkpoints/step_00000002: ")
    assert start.startswith(f"rank {start.split()[1]} of {world_size}: CheckpointError: checkpoint ")
    assert cause == "cannot be written: OSError: [Errno 27] File too large"
    assert not list((tmp_path / "out/checkpoints").iterdir())  # the room is free again
    log = (tmp_path / "out/ranks.log").read_text()
    assert "0/4" in log  # the bar
    assert f"error: {outcome.error}" in log


def test_every_rank_hears_of_it_and_earlier_checkpoints_stay(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_ranks(train, 2, small(out, loop={"steps": 2}, checkpoint={"every": 2}))
    before = [file.read_bytes() for file in sorted(out.glob("checkpoints/step_00000002/*"))]
    run_ranks(without_room, 2, small(out, loop={"steps": 4}, checkpoint={"every": 2, "keep": 1, "resume": "latest"}))
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000002"]
    assert [file.read_bytes() for file in sorted(out.glob("checkpoints/step_00000002/*"))] == before
    run_ranks(train, 2, small(out, loop={"steps": 4}, checkpoint={"every": 2, "resume": "latest"}))
    assert [row["step"] for row in read_rows(out)] == [1, 2, 3, 4]


def without_room(config: dict[str, dict[str, object]]) -> None:
    with files_of_at_most(300_000):
        try:
            train(config)
        except CheckpointError as error:
            assert "step_00000004: cannot be written: OSError: [Errno 27] File too large" in str(error)  # noqa: PT017
        else:
            raise AssertionError("the checkpoint was to be refused")


def test_checkpoints_that_is_a_file_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("mine")
    with pytest.raises(ValueError, match=r"^out='.*run': .*checkpoints is a file, expected a directory or nothing$"):
        train(small(tmp_path / "run", checkpoint={"every": 1}))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]


def test_a_folder_that_becomes_a_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashcp.train.loop import Trainer

    real = Trainer.learn

    def step(self: Trainer, *given: object) -> object:
        (tmp_path / "run" / "checkpoints").write_text("in the way")
        return real(self, *given)

    monkeypatch.setattr(Trainer, "learn", step)
    with pytest.raises(CheckpointError, match=r"step_00000001: cannot be written: (NotADirectory|FileExists)Error"):
        train(small(tmp_path / "run", loop={"steps": 2}, checkpoint={"every": 1}))
