"""The command: what it refuses, how it divides its time, and a sitting on a CPU in small."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashcp.experiments.campaign import __main__ as command
from flashcp.experiments.campaign import correct
from flashcp.experiments.campaign.__main__ import main
from flashcp.experiments.campaign.part import PARTS
from flashcp.experiments.campaign.watch import PartResult
from flashcp.experiments.sweep.results import read_rows
from tests.checkout import ROOT

LACKING = ("hydra", "omegaconf", "antlr4", "pydantic", "wandb", "hypothesis", "matplotlib", "numba", "tqdm", "yaml")
BLOCKED = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {LACKING!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
"""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["everything"], "part 'everything': expected one of correct, attention, overlap, tune, calibrate, hybrid"),
        (["tune", "--minutes", "0"], "minutes=0.0: expected a number > 0"),
        (["tune", "--minutes", "nan"], "minutes=nan: expected a number > 0"),
        (["--dry-run", "--processes", "0"], "processes=0: expected a whole number >= 1"),
        (["tune", "--small", "--out", "pyproject.toml"], "out='pyproject.toml': pyproject.toml is not a directory"),
    ],
)
def test_what_it_refuses(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"campaign: {message}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["overlap", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("campaign: it measures a GPU, and torch sees none here")
    assert list(tmp_path.iterdir()) == []


def test_parts_share_the_time_by_their_value(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, float] = {}

    def run(place: str, folder: Path, seconds: float, **_: object) -> PartResult:
        given[folder.name] = seconds
        return PartResult([], 0, 0, 0.0)

    monkeypatch.setattr(command, "run_part", run)
    monkeypatch.setattr(command, "_device", lambda: "")
    shares = {name: command.load(place).minutes for name, place in PARTS.items()}
    assert main(["--small", "--out", str(tmp_path)]) == 1  # no part brought a number home
    assert list(given) == list(PARTS)  # by value
    assert given["correct"] == pytest.approx(540 * shares["correct"] / sum(shares.values()), rel=0.02)
    assert given["hybrid"] == pytest.approx(540, rel=0.02)  # what earlier ones leave comes to later ones
    given.clear()
    assert main(["tune", "overlap", "--minutes", "2", "--small", "--out", str(tmp_path)]) == 1
    assert list(given) == ["overlap", "tune"]
    assert given["overlap"] == pytest.approx(120 * shares["overlap"] / (shares["overlap"] + shares["tune"]), rel=0.05)


def test_a_small_sitting(tmp_path: Path) -> None:
    words = ["overlap", "attention", "--cases", "t", "--small", "--minutes", "3", "--commit", "abc", "--out", tmp_path]
    command = [sys.executable, "-m", "flashcp.experiments.campaign", *map(str, words)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    first, *closing = run.stdout.splitlines()
    assert first.endswith(f"3 minutes, rows in {tmp_path}")
    attention, overlap = (read_rows(tmp_path / name) for name in ("attention", "overlap"))
    for line, name, rows in zip(closing, ("attention", "overlap"), (attention, overlap), strict=True):
        failures = sum(row.metric == "failed" for row in rows)
        assert line.startswith(f"{name}: {len(rows)} rows, {failures} failures, ")
    assert {row.commit for row in attention + overlap} == {"abc"}
    assert {row.metric for row in overlap} >= {"none_ms", "staged_ms", "fused_ms", "staged_over_bound"}
    found = {(row.case, row.provider, row.metric) for row in attention}
    assert {("tiny_4x2", "flashcp", "forward_tflops"), ("tiny_4x2", "flashcp", "backward_tflops")} <= found


def test_it_runs_where_libraries_are_missing(tmp_path: Path) -> None:
    """Every part is imported and lists its cases; one runs; windows are planned and links shared without numba."""
    script = f"""{BLOCKED}
from flashcp.experiments.campaign.part import PARTS, Turn, load
import torch
from pathlib import Path
import warnings
warnings.simplefilter("ignore")
for place in PARTS.values():
    assert load(place).cases(True) and load(place).cases(False), place
import flashcp
flashcp.plan([3000, 2000], 2, "flashcp", budget=100)
turn = Turn(torch.device("cpu"), Path({str(tmp_path)!r}), 60.0, small=True)
for tries_left in (2, 1, 0):
    try:
        found = list(load(PARTS["calibrate"]).measure("tiny", turn))
        break
    except ValueError as error:  # beside other work a tiny calibration may find no slope
        if "quieter machine" not in str(error) or not tries_left:
            raise
assert found
try:
    list(load(PARTS["hybrid"]).measure("wlb_llm_window_0", turn))
except ValueError as error:
    print(error)
from flashcp.experiments.campaign.__main__ import main
assert main(["nothing"]) == 2
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].endswith("reading it needs PyYAML, which is not installed")
    assert (tmp_path / "tiny.yaml").is_file()
    assert not (tmp_path / "tiny.png").exists()
    assert "no picture: No module named 'matplotlib'" in run.stderr


def test_tests_for_a_gpu_collect_where_libraries_are_missing() -> None:
    marked = sorted(correct.test_files())
    words = ["-q", "--collect-only", "-p", "pytest_timeout", "-m", "gpu", *marked]
    script = f"{BLOCKED}\nimport pytest\nsys.exit(pytest.main({words!r}))"
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # hydra brings a plugin
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=alone, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert {line.partition("::")[0] for line in run.stdout.splitlines() if "::" in line} == set(marked)


def test_what_its_processes_get(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "16")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(command, "run_part", lambda *_, **__: PartResult([], 0, 0, 0.0))
    monkeypatch.setattr(command, "_device", lambda: "")
    main(["tune", "--small", "--out", str(tmp_path)])
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "16"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    del os.environ["GLOO_SOCKET_IFNAME"]
