"""Launching ranks: the one line that says why a run failed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from flashcp.experiments.compose import compose
from flashcp.experiments.launch import Echo, diagnose, launch
from flashcp.experiments.settings import read_run, register_run

LAUNCHER = """Traceback (most recent call last):
torch.distributed.elastic.multiprocessing.errors.ChildFailedError: flashcp.train FAILED
"""


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
    ],
    ids=["bad input", "a rank", "a killed rank", "no word"],
)
def test_diagnosis(tmp_path: Path, log: str, code: int, error: str) -> None:
    file = tmp_path / "ranks.log"
    file.write_text(log)
    outcome = diagnose(file, 1)
    assert outcome.code == code
    assert outcome.error.startswith(error)


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
    register_run()
    (tmp_path / "a.jsonl").write_text('{"text": "hello"}\nnot json\n')
    run = read_run(compose("config", [*tiny, "data=jsonl", f"data.path={tmp_path}/a.jsonl", "world_size=1"]))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/mine.txt").write_text("mine")
    outcome = launch(run.placed(str(tmp_path / "kept/made/out"), "", ()))
    assert outcome.code == 2
    assert outcome.error.startswith(f"{tmp_path}/a.jsonl:2: not a line of JSON")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.jsonl", "kept", "mine.txt"]
