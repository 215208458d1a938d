"""Values of the command line that are meant as they stand, whatever Hydra's grammar makes of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashcp.experiments.cli.compose import PATHS, compose, composed_jobs, quoted
from flashcp.experiments.cli.main import main
from flashcp.experiments.cli.train import read_run
from tests.checkout import ROOT
from tests.experiments.jobs import expand

NAMES = [
    "a(1).txt",
    "Übung.txt",
    "a b.txt",
    "a,b.txt",
    "a=b.txt",
    "$a$.txt",
    "[1].txt",
    "{a}",
    "{",
    "it's",
    '"',
    "a\\'b\\",
]
NAMES += ["a#b!;&^`<>", "日本", "1e3", "1_0", "true", "choice(a)", "a:b", "(" * 200, "a\nb", "-x", "x@y"]
QUICK = ["world_size=2", "windows=1", "context=100"]


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Plans for the lengths of a file; returns those of the first window."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def run(*words: str) -> list[int]:
        assert main(["plan", "data=lengths", "method=flashcp", *QUICK, *words, "--json"]) == 0
        found: list[int] = json.loads(capsys.readouterr().out)["plan"]["document_lengths"]
        return found

    return run


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_taken_as_it_stands(planned: Any, name: str) -> None:
    Path(name).write_text("30\n70\n")
    assert planned(f"data.path={name}") == [30, 70]
    assert planned(f"data.path=~/{name}") == [30, 70]


@pytest.mark.parametrize("name", ["it's (1), {2}=[Ü]", "a,b", "1e3"])
def test_hydra_s_application_takes_it_too_and_a_figure(planned: Any, name: str) -> None:
    Path(name).write_text("30\n70\n")
    assert planned(f"data.path={name}", f"figure={name}.png", "--run") == [30, 70]
    assert Path(f"{name}.png").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_a_path_takes_it(name: str) -> None:
    words = [f"out={name}", f"checkpoint.resume={name}", f"replay={name}", f"data.tokenizer={name}"]
    settings = compose("train", words)
    run = read_run(settings)
    assert (run.config.out, run.config.checkpoint.resume, run.config.data.tokenizer) == (name, name, name)
    assert settings["replay"] == name
    assert compose("simulate", [f"cluster_file={name}"])["cluster_file"] == name


def test_what_parses_stays_as_it_is() -> None:
    words = [
        "data.lengths=[1,2]",
        "x={a:1}",
        "out=${seed}",
        "out='a b'",
        "out=",
        "a=1,2",
        "a=1e3",
        "--run",
        "-cd",
        "a(1)",
    ]
    assert quoted(words) == words
    words = ["-m", "out=a,b", "data.path=choice(a,b)", "seed=range(1,3)"]
    assert quoted(words) == words


@pytest.mark.parametrize("word", ["-m", "--multirun", "hydra.mode=MULTIRUN", "experiment=x"])
def test_a_comma_separates_values_where_there_are_several_jobs(word: str) -> None:
    assert quoted([word, "data.path=a(1).txt,b.txt,Ü"]) == [word, "data.path='a(1).txt',b.txt,'Ü'"]


def test_jobs_of_several_paths() -> None:
    words = ["data=text", "data.path=a(1),Übung"]
    assert [job.settings["data"]["path"] for job in expand("train", words)] == ["a(1)", "Übung"]
    outs = [settings["out"] for settings in composed_jobs("bench/lab", ["out=a(1),Übung"])]
    assert outs == ["a(1)", "Übung"]


def test_a_process_writes_to_the_path_as_it_stands(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Under Hydra's own application, from a folder of text; then the checkpoint is found there."""
    out, text = tmp_path / "out (Ü), a=b", tmp_path / "it's {text}"
    text.mkdir()
    (text / "a.txt").write_text("a" * 3000)
    words = ["train", *tiny, "data=text", f"data.path={text}", "world_size=1"]
    command = [sys.executable, "-m", "flashcp.experiments.cli.main", *words, f"out={out}", "checkpoint.every=2"]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    step = out / "checkpoints" / "step_00000002"
    assert main([*words, f"out={tmp_path}/[2]", f"checkpoint.resume={step}"]) == 2
    assert f"loop.steps=2: checkpoint {step} has done 2 steps already" in capsys.readouterr().err


def test_keys_that_are_read_as_paths_are_known() -> None:
    read = {
        line.split("read_path(")[1].split('"')[1].rpartition(".")[2]
        for folder in ("experiments", "train", "flashcp")
        for file in (ROOT / folder).rglob("*.py")
        for line in file.read_text().splitlines()
        if "read_path(" in line and '"' in line.split("read_path(")[1]
    }
    assert len(read) > 5
    assert read - {"checkpoint", "directory"} <= PATHS  # no overrides of Hydra's
