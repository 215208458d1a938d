"""A real sweep, small: rows and report, resume, a job that fails."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest

from flashcp.experiments.cli.main import main
from flashcp.experiments.sweep.compare import compare
from flashcp.experiments.sweep.results import REFERENCE, RESULTS, TURNS, read_rows
from flashcp.experiments.sweep.sweep import Sweep, locked


def test_sweep_resumes_and_outlives_a_failing_job(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    command = ["sweep", *tiny, f"out={out}", "method=llama3,flashcp_paper"]

    assert main(command) == 0
    shown = capsys.readouterr()
    assert "speedup over llama3" in shown.out
    rows = read_rows(out)
    assert {(row.case, row.provider) for row in rows} == {
        ("stdlib-c256-n1", REFERENCE),
        ("stdlib-c256-n2", "llama3"),
        ("stdlib-c256-n2", "flashcp_paper"),
    }
    assert {row.kind for row in rows} == {"measured"}
    comparison = compare(rows, "llama3")
    assert [line.provider for line in comparison.lines] == ["llama3", "flashcp_paper", REFERENCE]
    assert all(len(line.losses) == 2 for line in comparison.lines)
    assert {row.provider for row in rows if row.metric == TURNS} == {"llama3", "flashcp_paper"}
    assert len({row.median for row in rows if row.metric == TURNS}) == 1
    assert comparison.lines[1].speedup_p20
    assert comparison.worst_difference
    assert (comparison.worst_difference.loss_difference or 1) < 1e-4
    assert all((out / name).stat().st_size > 1000 for name in ("comparison.png", "dashboard.html"))

    before = (out / RESULTS).read_text()
    assert main([*command, "--json"]) == 0
    shown = capsys.readouterr()
    assert f"3 of 3 runs are in {out} already" in shown.err
    assert [method["name"] for method in json.loads(shown.out)["methods"]] == ["llama3", "flashcp_paper", REFERENCE]
    assert (out / RESULTS).read_text() == before

    assert main([*command[:-1], "method=llama3", "optimizer.lr=0.0003,1e300", "sweep.reference=false"]) == 1
    shown = capsys.readouterr()
    failures = [line for line in shown.out.splitlines() if line.startswith("failed: ")]
    assert len(failures) == 1  # the learning rate that diverges; the other was there already
    assert re.search(r"rank [01] of 2: RuntimeError: value cannot be converted", failures[0])
    cases = {row.case for row in read_rows(out) if row.provider == "llama3"}
    assert cases == {"stdlib-c256-n2", "stdlib-c256-n2-optimizer.lr=0.0003"}
    assert main(["report", str(out)]) == 0
    assert failures[0] in capsys.readouterr().out


@pytest.mark.parametrize(
    "sweep", [["method=llama3"], ["experiment=paper_fig3", "windows=1"]], ids=["runs", "simulations"]
)
@pytest.mark.parametrize("name", ["results.csv", "multirun.yaml"])
def test_folders_where_files_would_go_are_one_line(
    refused: Callable[..., str], tmp_path: Path, sweep: list[str], name: str
) -> None:
    (tmp_path / "out" / name).mkdir(parents=True)
    assert refused("sweep", *sweep, "out=out") == f"out='out/{name}': cannot be written (Is a directory)"


def test_a_file_where_the_folder_of_jobs_would_go_is_one_line(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/jobs").write_text("mine")
    assert refused("sweep", "out=out", "method=llama3").endswith("out/jobs is not a directory that may be written to")


def test_a_case_whose_name_is_too_long_is_one_line(refused: Callable[..., str]) -> None:
    message = refused("sweep", "out=out", "method=llama3", f"tracker.project={'x' * 300},y")
    assert message.endswith("cannot be written (File name too long)")


def test_jobs_of_other_processes_wait_for_a_folder(tmp_path: Path) -> None:
    """Another sweep's runs in turns, too."""
    entered = Event()
    runs: Any = [SimpleNamespace(provider=name, out=tmp_path / "case" / name) for name in "ab"]
    sweep: Any = SimpleNamespace(rerun=True, _train_together=lambda group: entered.set())

    def other() -> None:
        Sweep.train_together(sweep, runs)

    with locked(tmp_path / "case"):
        thread = Thread(target=other)
        thread.start()
        assert not entered.wait(0.3)
    assert entered.wait(30)
    thread.join()
