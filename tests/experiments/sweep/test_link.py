"""A sweep over a free link and a slowed one: what its rows are called, who is compared, what page and figure say."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from flashcp.experiments.cli.compose import compose
from flashcp.experiments.cli.main import main
from flashcp.experiments.cli.train import read_run
from flashcp.experiments.plots import comparison_figure
from flashcp.experiments.sweep.compare import columns, compare
from flashcp.experiments.sweep.report import render
from flashcp.experiments.sweep.results import LEFT_OUT, REFERENCE, Row, label, left_out_row, read_rows, write_rows
from flashcp.experiments.sweep.sweep import bypass

MakeRows = Callable[..., list[Row]]
FREE, SLOWED = "stdlib-c256-n2-link=free", "stdlib-c256-n2-link=h100-ib-400g"
BOTH = "parallel.link=free,h100-ib-400g"


def test_both_links_are_measured_and_told_apart(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    assert main(["sweep", *tiny, f"out={out}", BOTH, "method=llama3,flashcp_paper"]) == 0
    shown = capsys.readouterr()
    rows = read_rows(out)
    kinds = {(row.case, label(row.kind)) for row in rows if row.provider != REFERENCE}
    assert kinds == {(FREE, "measured"), (SLOWED, "emulated")}
    (kind,) = {row.kind for row in rows if row.case == SLOWED}  # every row says what was scaled by how much
    rate = re.match(
        r"emulated: rows leave at ([\de.-]+) GB/s, the 50 GB/s of a rank of h100-ib-400g across nodes", kind
    )
    assert rate
    summary = json.loads((out / "jobs" / SLOWED / "llama3/summary.json").read_text())
    assert float(rate[1]) == pytest.approx(summary["throttle_gbps"], rel=1e-2)
    assert f"{SLOWED} is {kind}" in shown.out
    assert f"{SLOWED} is {kind}" in shown.err
    # one process has no link: one run is the reference of both cases
    assert {row.case for row in rows if row.provider == REFERENCE} == {"stdlib-c256-n1"}
    assert len({row.reference for row in rows if row.provider != REFERENCE}) == 1

    comparison = compare(rows, "llama3")
    assert comparison.factors == ["link"]
    assert columns(comparison)[0].title == "link"
    assert [(line.link, line.provider) for line in comparison.runs] == [
        ("free", "llama3"),
        ("free", "flashcp_paper"),
        ("h100-ib-400g", "llama3"),
        ("h100-ib-400g", "flashcp_paper"),
    ]
    assert comparison.by_factor()[0] == ["link", "free", "h100-ib-400g (emulated)"]
    figure = comparison_figure(comparison)
    assert figure.subfigs[1].axes[0].get_xlabel() == "link"
    assert figure.subfigs[0].axes[3].get_title(loc="left").startswith(f"{SLOWED} (emulated)\n")
    for page in ("report.md", "dashboard.html"):
        text = (out / page).read_text()
        assert f"{SLOWED} (emulated)" in text
        assert kind.removeprefix("emulated: ") in text
        assert "measured and emulated on cpu" in text
    assert main(["report", str(out)]) == 0  # its rows are a sweep's, not a simulation's


def test_a_method_whose_rows_would_leave_at_once_is_left_out(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    command = ["sweep", *tiny, f"out={out}", "parallel.link=h100-ib-400g", "sweep.reference=false"]
    assert main([*command, "method=llama3,flashcp_paper", "parallel.transport=gloo"]) == 0
    why = "over gloo rows leave at once, not over a slowed link; shm and cuda_symmetric slow them"
    told = f"left out: stdlib-c256-n2 flashcp_paper: {why}"
    shown = capsys.readouterr()
    assert told in shown.err
    assert f"stdlib-c256-n2 flashcp_paper: left out: {why}" in shown.out
    assert {(row.metric, row.kind) for row in read_rows(out)} == {(LEFT_OUT, f"left out: {why}")}
    assert not (out / "jobs").exists()
    for page in ("report.md", "dashboard.html"):
        assert why in (out / page).read_text()

    assert main([*command, "method=llama3", "parallel.transport=shm"]) == 0  # a run of its own takes its place
    assert {label(row.kind) for row in read_rows(out) if row.provider == "llama3"} == {"emulated"}
    comparison = compare(read_rows(out), "llama3")
    assert [(line.provider, line.missing) for line in comparison.runs] == [("llama3", ""), ("flashcp_paper", LEFT_OUT)]
    assert LEFT_OUT in render(comparison, {}).splitlines()[4]


@pytest.mark.parametrize(
    ("overrides", "is_left_out"),
    [
        (["parallel.transport=gloo"], False),
        (["parallel.link=h100-ib-400g"], False),
        (["parallel.link=h100-ib-400g", "parallel.transport=cuda_symmetric"], False),
        (["parallel.link=h100-ib-400g", "parallel.transport=gloo"], True),
        (["parallel.link=h100-ib-400g", "parallel.transport=nvshmem"], True),
        (["parallel.throttle_gbps=0.1", "parallel.transport=nccl"], True),
    ],
)
def test_who_is_left_out(overrides: list[str], is_left_out: bool) -> None:
    assert bool(bypass(read_run(compose("train", overrides)))) == is_left_out


def emulated(rows: list[Row], gbps: float) -> list[Row]:
    return [dataclasses.replace(row, kind=f"emulated: rows leave at {gbps} GB/s") for row in rows]


def test_runs_at_other_rates_are_not_ranked(make_rows: MakeRows) -> None:
    rows = emulated(make_rows("llama3"), 0.1) + emulated(make_rows("ring", 5.0), 0.1)
    rows += emulated(make_rows("flashcp", 5.0), 0.2)
    found = {line.provider: (line.speedup, line.missing) for line in compare(rows, "llama3").lines}
    assert found == {"llama3": (1.0, ""), "ring": (2.0, ""), "flashcp": (None, "other link")}


def test_a_baseline_that_is_left_out_is_missing(make_rows: MakeRows) -> None:
    rows = [left_out_row("stdlib-c8k-n2", "llama3", "why", "llama3"), *make_rows("flashcp")]
    found = {line.provider: (line.speedup, line.missing) for line in compare(rows, "llama3").lines}
    assert found == {"llama3": (None, LEFT_OUT), "flashcp": (None, "no llama3")}


def test_a_measured_and_an_emulated_speedup_have_no_mean(
    tmp_path: Path, make_rows: MakeRows, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows("llama3", case=FREE) + make_rows("flashcp", 8.0, case=FREE)
    rows += emulated(make_rows("llama3", case=SLOWED) + make_rows("flashcp", 5.0, case=SLOWED), 0.1)
    comparison = compare(rows, "llama3")
    assert comparison.kinds == ["measured", "emulated"]
    assert comparison.mean_speedups() == {"llama3": 1.0, "flashcp": pytest.approx(1.25)}
    assert comparison.mean_speedups("emulated") == {"llama3": 1.0, "flashcp": pytest.approx(2.0)}
    write_rows(tmp_path, rows)
    assert main(["report", str(tmp_path)]) == 0
    tiles = (tmp_path / "report.md").read_text()
    assert "- **1.25x** flashcp, fastest step over llama3\n" in tiles
    assert "- **2.00x** flashcp, fastest step over llama3 (link slowed: emulated)\n" in tiles


def test_a_slowed_link_needs_turns(refused: Callable[..., str], tiny: list[str]) -> None:
    message = refused("sweep", *tiny, "out=sweep", BOTH, "sweep.turns=false")
    assert message == "sweep.turns=False with parallel.link=h100-ib-400g: expected true: turns share its rate"
