"""metrics.jsonl is the record; wandb is beside it and never stops a run."""

from __future__ import annotations

import json
import os
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from flashcp.train.tracker import Tracker, TrackerConfig, track_comparison

DISABLED = TrackerConfig(wandb="disabled")


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_rows_are_on_disk_at_once(tmp_path: Path) -> None:
    tracker = Tracker(DISABLED, tmp_path / "new" / "run", {})
    for step in (1, 2):
        tracker.log({"step": step, "loss": 1.5})
        assert steps_in(tmp_path / "new" / "run" / "metrics.jsonl") == list(range(1, step + 1))
    tracker.close()


def test_a_resumed_run_replaces_rows_past_its_checkpoint(tmp_path: Path) -> None:
    first = Tracker(DISABLED, tmp_path, {})
    for step in (1, 2, 3, 4):
        first.log({"step": step, "loss": 1.0})
    first.close()
    resumed = Tracker(DISABLED, tmp_path, {}, first_step=3)
    assert [row["step"] for row in resumed.rows] == [1, 2]
    resumed.log({"step": 3, "loss": 2.0})
    resumed.close()
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3]


def test_a_damaged_record_takes_bounded_memory(tmp_path: Path) -> None:
    record = tmp_path / "metrics.jsonl"
    record.write_text('{"step": 1}\n{"step": 2}\n{"st')
    tracker = Tracker(DISABLED, tmp_path, {}, first_step=3)
    tracker.close()
    assert tracker.rows == [{"step": 1}, {"step": 2}]  # and not the row that was cut off
    os.truncate(record, 300 * 2**20)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"metrics\.jsonl:3: not a row of metrics \(more than 1048576 bytes\); move"):
        Tracker(DISABLED, tmp_path, {}, first_step=3)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 8 * 2**20


def test_wandb_offline_writes_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config = TrackerConfig(wandb="offline", group="sweep", name="flashcp-n2", tags=["t"])
    tracker = Tracker(config, tmp_path, {"context": 8})
    tracker.log({"step": 1, "loss": 1.5})
    tracker.close({"final_loss": 1.5})
    (run,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 20  # wandb's own process writes the file, and finish does not wait for it
    while b"final_loss" not in run.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)
    content = run.read_bytes()
    assert b"flashcp-n2" in content
    assert b"final_loss" in content


def test_comparison_is_one_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config = TrackerConfig(wandb="offline", group="sweep", job_type="compare")
    rows = [["llama3", 1.0], ["flashcp", None]]
    track_comparison(
        config, tmp_path, ["provider", "speedup"], rows, ("provider", "speedup"), {"speedup_vs_llama3": 1.5}
    )
    (run,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 20
    while b"speedup_vs_llama3" not in run.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)
    content = run.read_bytes()
    assert b"speedup_vs_llama3" in content
    assert b"compare" in content
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/comparison*.json")
    assert json.loads(table.read_text())["data"] == rows


def test_without_wandb_the_run_goes_on_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = Tracker(TrackerConfig(wandb="offline"), tmp_path, {})
    for step in (1, 2):
        tracker.log({"step": step, "loss": 1.5})
    tracker.close({"final_loss": 1.5})
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2]
    assert capsys.readouterr().err.count("wandb is off for the rest of this run") == 1
