"""The H100's parameters: the committed ones are what the fit finds, and reproduce the column they were fitted to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashcp.clusters import read_cluster_file, read_machine
from flashcp.experiments.cli.compose import compose
from flashcp.experiments.cli.main import main
from flashcp.experiments.paper.fit import PaperFit, fit_rows, fit_table
from flashcp.experiments.paper.numbers import BREAKDOWN


def test_the_committed_parameters_are_the_fit_s() -> None:
    machine = read_machine(compose("simulate", [])["cluster"])
    weight = float(machine.provenance["published"].split("long_document_weight ")[1].split(",")[0])
    (fit,) = fit_rows(PaperFit(weights=[weight], windows=60))
    committed, refitted = machine.attention.forward.tflops, fit.machine.attention.forward.tflops
    assert refitted == pytest.approx(committed, rel=0.1)  # fewer windows
    assert fit.machine.links.node.gbps == pytest.approx(machine.links.node.gbps, rel=1e-3)
    assert fit.machine.published.gathered_passes == pytest.approx(machine.published.gathered_passes, rel=1e-3)
    for method, parts in fit.breakdown.items():
        for ours, theirs in zip(parts, BREAKDOWN["wlb_llm"][method], strict=True):
            assert ours == pytest.approx(theirs, rel=0.15), method
    assert "<- chosen" in fit_table([fit])


def test_windows_as_sampled_hold_too_little_work() -> None:
    """Without more long documents no attention rate makes both methods' times come out (see PAPER.md's mismatch)."""
    sampled, richer = fit_rows(PaperFit(weights=[1.0, 12.0], windows=40))
    assert sampled.error > 4 * richer.error
    assert sampled.machine.attention.forward.tflops < 200


def test_bench_writes_a_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fit.yaml"
    assert main(["bench", "paper_fit", "weights=[12]", "windows=2", f"out={out}", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    machine = read_cluster_file(str(out))
    assert machine.attention.forward.tflops == pytest.approx(row["machine"]["attention"]["forward"]["tflops"], rel=1e-3)
    assert main(["bench", "paper_fit", "out=fit.csv"]) == 2
    assert "expected a file *.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("windows=0", "windows=0: expected a whole number >= 1"),
        ("seed=-1", "seed=-1: expected a whole number >= 0"),
        ("weights=[]", "weights=[]: expected numbers > 0, at least one"),
        ("weights=[12,0]", "weights=[12.0, 0.0]: expected numbers > 0, at least one"),
    ],
)
def test_settings_that_describe_no_fit(
    setting: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "paper_fit", setting, f"out={tmp_path / 'fit.yaml'}"]) == 2
    assert message in capsys.readouterr().err
