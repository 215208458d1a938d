"""Checkpoints written beside the steps: as whole, as late and as loud as those that the steps wait for."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from flashcp.train import saving
from flashcp.train.checkpoint import CheckpointError
from flashcp.train.lineage import Lineage, find_latest
from tests.ranks import RankError, run_ranks
from tests.train.test_run import TIMES, assert_same_checkpoint, read_rows, small, train, train_and_die_at, without
from tests.train.test_save_fails import files_of_at_most

Write = Callable[..., Path]


@contextmanager
def writing(around: Callable[[Write], Write]) -> Iterator[None]:
    """Checkpoints are written by what `around` makes of the real writer."""
    real = saving.write_checkpoint
    saving.write_checkpoint = around(real)
    try:
        yield
    finally:
        saving.write_checkpoint = real


def late(real: Write) -> Write:
    """Begins when the steps that follow are done, or nearly."""

    def write(*given: Any) -> Path:
        time.sleep(0.5)
        return real(*given)

    return write


def train_written_late(config: dict[str, Any], die_at: int = 0) -> None:
    with writing(late):
        train_and_die_at(config, die_at) if die_at else train(config)
        latest = find_latest(Path(config["out"]))  # here and now: whoever fails waits for what it had begun
        assert latest is not None
        assert latest.name == ("step_00000003" if die_at else "step_00000006")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_is_of_its_own_step_and_resumes_bit_for_bit(world_size: int, tmp_path: Path) -> None:
    beside = {"every": 3, "asynchronous": True}
    run_ranks(train, world_size, small(tmp_path / "whole", checkpoint={"every": 3}))
    run_ranks(train_written_late, world_size, small(tmp_path / "late", checkpoint=beside))
    resumed = tmp_path / "resumed"
    run_ranks(train_written_late, world_size, small(resumed, checkpoint=beside), 4)
    run_ranks(train, world_size, small(resumed, checkpoint={**beside, "resume": "latest"}))
    for step in ("step_00000003", "step_00000006"):
        for name in ("late", "resumed"):
            assert_same_checkpoint(tmp_path / "whole/checkpoints" / step, tmp_path / name / "checkpoints" / step)
    rows = [without(read_rows(tmp_path / name), TIMES) for name in ("whole", "late")]
    assert rows[0] == rows[1]
    assert without(read_rows(resumed), TIMES) == rows[0]


def test_one_after_another_and_the_run_waits_for_the_last(tmp_path: Path) -> None:
    events: list[str] = []

    def noted(real: Write) -> Write:
        def write(*given: Any) -> Path:
            step = given[4].step
            events.append(f"begin {step}")
            path = late(real)(*given)
            events.append(f"end {step}")
            return path

        return write

    with writing(noted):
        summary = train(small(tmp_path / "run", checkpoint={"every": 2, "asynchronous": True}))
    events.append("the run is over")
    assert events == [*(f"{what} {step}" for step in (2, 4, 6) for what in ("begin", "end")), "the run is over"]
    assert [path.name for path in sorted(tmp_path.glob("run/checkpoints/*"))] == ["step_00000004", "step_00000006"]
    assert summary is not None
    assert 0 < summary["checkpoint_ms"]["p20"] <= summary["checkpoint_ms"]["p80"]


def without_room(config: dict[str, Any]) -> str:
    with files_of_at_most(300_000), pytest.raises(CheckpointError) as raised:
        train(config)
    return str(raised.value)


@pytest.mark.parametrize(("world_size", "every"), [(1, 20), (2, 20), (2, 40)])
def test_a_full_disk_ends_the_run_soon_on_all_ranks(world_size: int, every: int, tmp_path: Path) -> None:
    out, steps = tmp_path / "run", 40
    loop, short = {"steps": 2, "accumulation": 1}, {"context": 131}
    run_ranks(train, world_size, {**small(out, loop=loop, checkpoint={"every": 2}), **short})
    before = [file.read_bytes() for file in sorted(out.glob("checkpoints/*/*"))]
    checkpoint = {"every": every, "asynchronous": True, "resume": "latest"}
    config = {**small(out, loop={**loop, "steps": steps}, checkpoint=checkpoint), **short}
    said = run_ranks(without_room, world_size, config)
    line = f"checkpoint {out}/checkpoints/step_000000{every}: cannot be written: OSError: [Errno 27] File too large"
    assert said == [line] * world_size
    done = len(read_rows(out))
    assert every <= done < steps if every < steps else done == steps  # not as late as the next one is due
    assert [file.read_bytes() for file in sorted(out.glob("checkpoints/*/*"))] == before
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000002"]


def train_and_be_killed(config: dict[str, Any]) -> None:
    """The last rank dies when the files of the second checkpoint are there and its identity is not."""
    real = Lineage.place

    def place(lineage: Lineage, step: int) -> Path:
        if step == 4 and dist.get_rank() == dist.get_world_size() - 1:
            from flashcp.train import checkpoint

            checkpoint.checksum = lambda file: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        return real(lineage, step)

    Lineage.place = place  # type: ignore[method-assign]
    train(config)


def test_a_rank_killed_amid_a_checkpoint_leaves_the_one_before(tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = small(out, checkpoint={"every": 2, "asynchronous": True}, loop={"timeout_s": 20})
    with pytest.raises(RankError, match="rank 1 of 2 died"):
        run_ranks(train_and_be_killed, 2, config)
    assert json.loads((out / "latest.json").read_text())["checkpoint"] == "checkpoints/step_00000002"
    assert find_latest(out) == out / "checkpoints/step_00000002"
    assert not (out / "checkpoints/step_00000004").exists()
    assert (out / "checkpoints/unfinished_step_00000004/__1_0.distcp").exists()
    run_ranks(train, 2, small(out, checkpoint={"every": 2, "asynchronous": True, "resume": "latest"}))
    run_ranks(train, 2, small(tmp_path / "whole", checkpoint={"every": 2}))
    for step in ("step_00000004", "step_00000006"):
        assert_same_checkpoint(tmp_path / "whole/checkpoints" / step, out / "checkpoints" / step)
