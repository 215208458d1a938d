"""`python -m flashcp.train`: exit codes, one line for bad input, the rank's name when a rank fails."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashcp.train.__main__ import main
from tests.checkout import ROOT
from tests.train.test_run import small


def write(tmp_path: Path, config: dict[str, Any]) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


def launch(path: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*torchrun, "-m", "flashcp.train", path]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"source": "text", "path": "no/where"}}, "data.path='no/where': no such file or directory"),
        ({"data": {"source": "pile"}}, "data.source='pile' holds document lengths and no text"),
        ({"data": {"sauce": "pile"}}, "data.sauce: no such field; expected one of source, path"),
        ({"data": {"tokenizer": "./words.json"}}, "data.tokenizer='./words.json': cannot be read"),
        ({"model": {"heads": 3}}, "model.dim=32: expected an even multiple of model.heads=3"),
        ({"model": {"vocab_size": 100}}, "model.vocab_size=100: expected 0 or at least the tokenizer's 257"),
        ({"parallel": {"transport": "pigeon"}}, "transport"),
        ({"parallel": {"overlap": "maybe"}}, "overlap"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    sections: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([write(tmp_path, small(tmp_path / "run", **sections))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_corrupt_line_is_named_before_and_during_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = json.dumps({"text": "all is well " * 60}) + "\n"
    (tmp_path / "d.jsonl").write_text("{}\n" + good)
    data = {"source": "jsonl", "path": str(tmp_path / "d.jsonl"), "prefetch": 1}
    config = write(tmp_path, small(tmp_path / "run", data=data))
    assert main([config]) == 2
    assert "d.jsonl:1: no text in data.text_field='text'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (tmp_path / "d.jsonl").write_text(good * 8 + '{"text": "cut\n')
    assert main([config]) == 2
    assert "d.jsonl:9: not a line of JSON" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") >= 1
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_failing_rank_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small(tmp_path / "run", optimizer={"lr": 1e30, "warmup_steps": 0, "clip_norm": 0})
    assert main([write(tmp_path, config)]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    why = r"^error: rank 0 of 1: FloatingPointError: step 2: the loss is \S+, the norm of its gradients (nan|inf): .*$"
    assert re.search(why, error, re.MULTILINE)


def test_two_launched_ranks_train(tmp_path: Path) -> None:
    path = write(tmp_path, small(tmp_path / "run", loop={"steps": 3, "progress": True}))
    done = launch(path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["world_size"], summary["steps"]) == (2, 3)
    assert "3/3" in done.stderr  # the bar


def test_launched_ranks_report_bad_input_once(tmp_path: Path) -> None:
    done = launch(write(tmp_path, small(tmp_path / "run", data={"source": "csv"})))
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "data.source='csv': expected one of stdlib" in said[0]
    assert not (tmp_path / "run").exists()
