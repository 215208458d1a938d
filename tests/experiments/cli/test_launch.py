"""Launching ranks: the one line that says why a run failed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from flashcp.experiments.cli.compose import compose
from flashcp.experiments.cli.launch import Echo, diagnose, launch, rank_environment, start_ranks
from flashcp.experiments.cli.train import read_run

LAUNCHER = """Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError: flashcp.train FAILED
"""
CLOSED = "RuntimeError: [/x/gloo/pair.cc:547] Connection closed by peer [::1]:7. This may indicate a failure...GLHF!"
FAILED = "E1123 failed (exitcode: %d) local_rank: %d (pid: 7) of binary: python\n"
LISTED = "  rank      : %d (local_rank: 0)\n  exitcode  : %d (pid: 8)\n"


@pytest.mark.parametrize(
    ("log", "code", "error"),
    [
        (f"noise\nerror: data.path='x': no such file\n{LAUNCHER}", 2, "data.path='x': no such file"),
        (f" 3/24 [00:01]error: rank 1 of 2: OSError: disk\n{LAUNCHER}", 1, "rank 1 of 2: OSError: disk"),
        (
            "E1123 failed (exitcode: -9) local_rank: 1 (pid: 7) of binary: python\n",
            1,
            "rank 1: ended with exit code -9",
        ),
        ("", 1, "the run ended with exit code 1"),
        (f"error: rank 0 of 2: {CLOSED}\n{FAILED % (-9, 1)}", 1, "rank 1: ended with exit code -9 (SIGKILL)"),
        (
            f"error: rank 0 of 2: {CLOSED}\n{FAILED % (1, 0)}{LISTED % (1, -9)}",
            1,
            "rank 1: ended with exit code -9 (SIGKILL)",
        ),
        (
            f"error: rank 1 of 2: {CLOSED}\n{FAILED % (1, 1)}{LISTED % (0, -15)}",
            1,
            "rank 1 of 2: RuntimeError: Connection closed by peer [::1]:7",
        ),
    ],
    ids=["bad input", "a rank", "a killed rank", "no word", "killed, heard", "killed, heard first", "gloo's noise"],
)
def test_diagnosis(tmp_path: Path, log: str, code: int, error: str) -> None:
    file = tmp_path / "ranks.log"
    file.write_text(log)
    outcome = diagnose(file, 1)
    assert outcome.code == code
    assert outcome.error.startswith(error)
    assert "GLHF" not in outcome.error


def test_echo_stops_at_the_first_trouble(capsys: pytest.CaptureFixture[str]) -> None:
    log = io.BytesIO(b"one\rtwo\n")
    echo = Echo(log)
    echo()
    log.write(b"three\nerror: rank 0 of 2: no\nTraceback ...\n")
    log.seek(8)
    echo()
    echo()
    assert capsys.readouterr().err == "one\rtwo\nthree\n"


def test_bad_input_found_by_the_ranks_leaves_only_what_was_there(tmp_path: Path, tiny: list[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "hello"}\nnot json\n')
    run = read_run(compose("train", [*tiny, "data=jsonl", f"data.path={tmp_path}/a.jsonl", "world_size=1"]))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/mine.txt").write_text("mine")
    outcome = launch(run.placed(str(tmp_path / "kept/made/out"), "", ()))
    assert outcome.code == 2
    assert outcome.error.startswith(f"{tmp_path}/a.jsonl:2: not a line of JSON")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.jsonl", "kept", "mine.txt"]


def test_bad_input_met_after_the_first_step_keeps_what_was_written(tmp_path: Path, tiny: list[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "%s"}\n' % ("hello " * 50) * 8 + "not json\n")
    overrides = ["data=jsonl", f"data.path={tmp_path}/a.jsonl", "data.prefetch=1", "loop.steps=50", "world_size=1"]
    run = read_run(compose("train", [*tiny, *overrides]))
    outcome = launch(run.placed(str(tmp_path / "out"), "", ()))
    assert (outcome.code, outcome.error[: len(f"{tmp_path}/a.jsonl:9")]) == (2, f"{tmp_path}/a.jsonl:9")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "metrics.jsonl", "ranks.log"}


def test_a_stopped_command_stops_its_ranks(tmp_path: Path, tiny: list[str]) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "flashcp.experiments.cli.main", "train", *tiny, "loop.steps=1000000", f"out={out}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: (out / "metrics.jsonl").is_file())
        assert alive(out)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.terminate()
    assert process.returncode == 143
    assert said.endswith("flashcp: stopped by SIGTERM\n")
    assert alive(out) == []


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def alive(out: Path) -> list[str]:
    """The processes that were started with a run's configuration."""
    found = []
    for process in os.listdir("/proc"):
        with suppress(OSError):
            words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
            found += [process] if str(out / "config.json").encode() in words else []
    return found


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["parallel.attention=triton", "loop.device=cpu"], {"TRITON_INTERPRET": "1"}),
        (["parallel.attention=cpu", "loop.device=cpu"], {}),
        (["loop.device=cpu"], {}),
        (["parallel.attention=triton", "loop.device=cuda"], {}),
    ],
)
def test_interpreter_is_on_where_triton_runs_on_a_cpu(overrides: list[str], wanted: dict[str, str]) -> None:
    assert rank_environment(read_run(compose("train", overrides)).config) == wanted


def test_ranks_start_with_their_number_threads_and_environment(tmp_path: Path) -> None:
    log = tmp_path / "ranks.log"
    script = "import os; print(*(os.environ.get(n) for n in ('RANK', 'WORLD_SIZE', 'OMP_NUM_THREADS', 'MARK')))"
    (tmp_path / "script.py").write_text(script)
    assert start_ranks([str(tmp_path / "script.py")], 2, 3, log, {"MARK": "here"}).code == 0
    assert sorted(log.read_text().splitlines()) == ["0 2 3 here", "1 2 3 here"]
    assert start_ranks(["-c", "raise SystemExit(3)"], 1, 1, log).error.startswith("the run ended with exit code 3")


def test_an_interpreted_run_trains(tmp_path: Path, tiny: list[str]) -> None:
    small = ["context=32", "parallel.attention=triton", "parallel.overlap=staged", "parallel.transport=shm"]
    run = read_run(compose("train", [*tiny, *small])).placed(str(tmp_path / "out"), "", ())
    assert launch(run, watch=lambda: None) == (0, "")
    losses = json.loads((tmp_path / "out/summary.json").read_text())["losses"]
    assert launch(run.alone().placed(str(tmp_path / "alone"), "", ()), watch=lambda: None) == (0, "")
    assert losses == pytest.approx(json.loads((tmp_path / "alone/summary.json").read_text())["losses"], rel=1e-5)
