"""The paper's figures from small runs: rows, pictures, cells, the page; committed sweeps are as large as they say."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashcp.experiments.cli.main import main
from flashcp.experiments.cli.schema import committed
from flashcp.experiments.cli.simulate import chosen_variants, read_setting, step_of
from flashcp.experiments.paper.beyond import BASELINES, DATA, measured_rows, stages
from flashcp.experiments.paper.figures import FIGURES, write_paper_page
from flashcp.experiments.paper.numbers import BREAKDOWN, Cell, Numbers, read_case, verdict
from flashcp.experiments.paper.published import breakdown
from flashcp.experiments.paper.workloads import mixed
from flashcp.experiments.sweep.results import Row, read_rows, write_rows
from flashcp.experiments.sweep.simulations import case_name
from flashcp.sharding.methods import METHODS
from tests.checkout import ROOT
from tests.experiments.jobs import expand

WORKLOADS = {"Gemma 3 27B": "gemma3", "gpt-oss 120B": "gpt_oss", "BERT large": "full"}
"""Models in the rows of `flashcp bench mixes`."""
SMALL = {
    "paper_fig3": [],
    "paper_fig5": ["windows=1"],
    "paper_fig6": ["windows=2"],
    "paper_fig7": ["windows=1"],
    "paper_table2": [
        "windows=1",
        "context=16384",
        "solver.granule=1024",
        "solver.limit_s=2",
        "data.long_document_weight=1,10",
    ],
    "demo_predicted": ["windows=1", f"measured=[{ROOT / 'experiments/results/demo_repeats'}]"],
    "demo_hybrid": [
        "windows=1",
        "context=512",
        f"measured=[{ROOT / 'experiments/results/demo_repeats'}]",
    ],
    "speedup_parts": ["windows=1"],
    "beyond_paper": [
        "windows=1",
        "world_size=8,32",
        "context=131072",
        "data=wlb_llm,pile",
        "cluster=h100-nvlink,h100-ib-400g",
    ],
    "whole_batch": ["context=16384", "world_size=64", "windows=8"],
    "whole_batch_1024": ["context=2048", "world_size=64", "batch_windows=8", "windows=8"],
    "whole_batch_steps": ["context=16384", "micro_batches=2", "windows=16"],
    "mixes": ["context=16384", "world_size=8", "windows=1"],
}


FEWER = {"beyond_paper": ["world_size=8,64", "context=65536,1048576"]}
"""Of a sweep whose jobs take a minute to compose."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every sweep run once, small."""
    pytest.importorskip("ortools")
    out = tmp_path_factory.mktemp("paper")
    for name, overrides in SMALL.items():
        assert main(["sweep", f"experiment={name}", f"out={out / name}", *overrides]) == 0, name
    return out


def test_every_sweep_that_simulates_has_a_figure_and_a_note() -> None:
    template = (ROOT / "experiments/paper/page.md.j2").read_text()
    noted = set(re.findall(r'"(\w+)"', " ".join(re.findall(r"if one.name (?:==|in) (.*?) %}", template))))
    assert set(committed("simulation")) == set(FIGURES) == noted == set(SMALL)


@pytest.mark.timeout(900)  # the first of them compiles the simulator
@pytest.mark.parametrize("name", committed("simulation"))
def test_committed_sweeps_compose_and_could_run(name: str) -> None:
    first, second = (ROOT / f"conf/simulation/{name}.yaml").read_text().splitlines()[:2]
    assert (first, second) == ("# @package _global_", f"# flashcp sweep experiment={name}")
    jobs = expand("simulations", [f"simulation={name}", *FEWER.get(name, [])])
    assert len({case_name(job.settings) for job in jobs}) == len(jobs) >= 1
    for job in jobs:
        setting, _ = read_setting(job.settings)
        assert chosen_variants(job.settings, setting, step_of(job.settings), 0)
        assert job.settings["name"] == name
        _check_columns(job.settings)
    assert sum(job.settings["windows"] for job in jobs) <= 2_040


def _check_columns(settings: Mapping[str, Any]) -> None:
    """The columns of a case are those that its name was made of."""
    case = read_case(case_name(settings))
    assert case, case_name(settings)
    assert (case.ranks, case.context) == (settings["world_size"], settings["context"])
    assert case.weight == settings["data"].get("long_document_weight", 1)
    assert int(case.heads.split(":")[0]) == settings["model"]["query_heads"]
    assert bool(case.mask) == bool(settings["model"]["narrowed_layers"] or settings["model"]["mask"] == "full")
    assert case.cluster == settings["cluster"]["name"]
    assert case.overlap == settings["overlap"].replace("auto", "")


def test_paper_settings_are_the_paper_s() -> None:
    (one, other) = (job.settings for job in expand("simulations", ["simulation=paper_fig6"]))
    assert (one["data"]["source"], one["data"]["long_document_weight"]) == ("wlb_llm", 13)
    assert (other["data"]["source"], other["data"]["long_document_weight"]) == ("pile", 1)
    for settings in (one, other):
        assert (settings["world_size"], settings["context"], settings["cluster"]["name"]) == (8, 131_072, "h100-nvlink")
        assert (settings["model"]["query_heads"], settings["model"]["kv_heads"]) == (32, 32)
    heads = {(job.settings["model"]["query_heads"], job.settings["model"]["kv_heads"]) for job in _fig5_jobs()}
    assert heads == {(16, 16), (32, 32)}


def _fig5_jobs() -> list:  # type: ignore[type-arg]
    return expand("simulations", ["simulation=paper_fig5"])


def test_rows_carry_what_a_number_must(folder: Path) -> None:
    for name in SMALL:
        rows = read_rows(folder / name)
        kinds = {"kernel=measured exchange=modelled" if name == "demo_hybrid" else "simulated"}
        assert {row.kind for row in rows} == kinds | ({"measured"} if name.startswith("demo") else set())
        assert all(row.date and row.commit and "flashcp" in row.versions for row in rows)
        assert (folder / name / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert {row.device for row in read_rows(folder / "paper_fig5")} == {"simulated h100-nvlink"}


def test_one_document_is_the_same_plan_for_llama3_and_per_document(folder: Path) -> None:
    numbers = Numbers(read_rows(folder / "paper_fig3"))
    cells = {cell.what: cell for cell in FIGURES["paper_fig3"].cells(numbers)}
    assert cells["one 128K document, per_document over llama3"].ours == pytest.approx(1)
    assert all(cell.within for cell in cells.values())


def test_the_breakdown_adds_up_to_the_module(folder: Path) -> None:
    numbers = Numbers(read_rows(folder / "paper_fig6"))
    for data, methods in BREAKDOWN.items():
        case = numbers.case(data=data, ranks=8, heads="32")
        for method in methods:
            assert breakdown(numbers, data, method).total == pytest.approx(numbers(case, method, "module_ms"))
    assert len(FIGURES["paper_fig6"].cells(numbers)) == 2 * (3 * 6 + 9)


def test_changes_one_at_a_time_multiply_to_the_whole_speedup(folder: Path) -> None:
    numbers = Numbers(read_rows(folder / "speedup_parts"))
    for data in DATA:
        for baseline in BASELINES:
            found = stages(numbers, data, baseline)
            assert found[0].ms / found[-1].ms == pytest.approx(math.prod(stage.speedup for stage in found))
            assert found[0].ms == numbers(numbers.case(data=data, overlap="staged"), baseline, "module_ms")
            assert found[1].speedup > 1  # copies cost something
            assert found[2].speedup > 1  # and so does waiting
        assert len({stages(numbers, data, baseline)[-1].ms for baseline in BASELINES}) == 1


def test_the_page_shows_every_number(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "docs" / "PAGE.md"
    shutil.copytree(ROOT / "experiments/results/paper/calibration", folder / "calibration")
    assert main(["report", str(folder), f"page={page}"]) == 0
    assert f"wrote {page}" in capsys.readouterr().err
    text = page.read_text()
    for name, figure in FIGURES.items():
        numbers = Numbers(read_rows(folder / name))
        assert f"## {name}: {figure.title}" in text
        for cell in figure.cells(numbers):
            assert f"| {cell.what} | {cell.paper:.3g} | {cell.ours:.3g} |" in text
        (picture,) = [line for line in text.splitlines() if line.startswith(f"![{name}]")]
        assert (page.parent / picture.split("(")[1].rstrip(")")).is_file()
    for section in text.split("\n## ")[1 : 1 + len(FIGURES)]:
        assert re.fullmatch(r"[A-Z].{200,}\.", section.strip().split("\n\n")[-1], re.DOTALL), section  # prose
    assert "{" not in text
    assert "## calibration: this_machine" in text
    assert "| forward | 200 |" in text


def test_a_sweep_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "experiment=paper_fig3", f"out={tmp_path / 'fig3'}", "--json"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)["rows"]
    assert {row["provider"] for row in rows} == {"llama3", "per_document", "ring_zigzag"}
    assert "numbers that should come out" in err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["zz=1"], "zz: no such override"),
        (["methods=[llama]"], "methods: 'llama'"),
        (["model.query_heads=5", "model.kv_heads=2"], "model.query_heads=5"),
    ],
)
def test_a_wrong_sweep_is_refused(
    overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "experiment=paper_fig6", f"out={tmp_path / 'x'}", *overrides]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)
    assert not (tmp_path / "x").exists()


def test_within_fifteen_percent_or_the_distance_that_is_allowed() -> None:
    assert Cell("x", 2.0, 2.3).within
    assert not Cell("x", 2.0, 2.31).within
    assert Cell("x", 1.4, 1.5, allowed=0.15, absolute=True).within
    assert not Cell("x", 1.4, 1.6, allowed=0.15, absolute=True).within
    cells = [Cell("a", 1.0, 1.0), Cell("b", 1.0, 2.0), Cell("c", 1.0, 9.0, judged=False)]
    assert verdict(cells) == "1 of 2 numbers that should come out do; farthest: b: 1, ours 2 (+100.0%); outside: b"


def test_a_case_without_rows_is_named() -> None:
    assert read_case("stdlib-c8k-n2") is None
    numbers = Numbers([])
    with pytest.raises(ValueError, match="0 cases of data=pile, ranks=8"):
        numbers.case(data="pile", ranks=8)
    with pytest.raises(ValueError, match="no row for a, b, c"):
        numbers("a", "b", "c")


def test_measured_times_of_several_sweeps_become_one(tmp_path: Path) -> None:
    rows = [row for row in read_rows(ROOT / "experiments/results/demo_repeats") if row.metric == "step_ms"]
    for number, factor in enumerate((1.0, 1.2, 2.0)):
        place = tmp_path / str(number)
        place.mkdir()
        write_rows(place, [dataclasses.replace(row, median=row.median * factor) for row in rows])
    one = measured_rows([str(tmp_path / "0")])
    assert {row.provider for row in one} == set(METHODS)
    merged = measured_rows([str(tmp_path / str(number)) for number in range(3)])
    for single, row in zip(one, merged, strict=True):
        assert row.median == pytest.approx(1.2 * single.median)
        assert row.p80 == pytest.approx(np.percentile([1, 1.2, 2.0], 80) * single.median)
    with pytest.raises(ValueError, match="expected the directory of a sweep"):
        measured_rows([str(tmp_path)])


def test_pairs_that_no_measurement_tells_apart_are_counted_as_that() -> None:
    figure = FIGURES["demo_predicted"]
    rows = read_rows(ROOT / "experiments/results/paper/demo_predicted")
    assert figure.facts(Numbers(rows))["told_apart"] > 0
    vague = [dataclasses.replace(row, p20=0.0, p80=9e9) if row.kind == "measured" else row for row in rows]
    facts = figure.facts(Numbers(vague))
    assert (facts["told_apart"], facts["wrong"], facts["pairs"]) == (0, [], 28)


def test_the_committed_page_is_what_its_rows_say(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "experiments/results/paper", tmp_path / "results/paper")
    page = write_paper_page(tmp_path / "results/paper", tmp_path / "PAPER_RESULTS.md")
    assert page.read_text() == (ROOT / "experiments/PAPER_RESULTS.md").read_text()


def worth_table(simulated: Sequence[Row], planned: Path) -> str:
    """What a plan for the mix is worth, as docs/masks.md shows it: rows of `experiment=mixes`, and the file of
    `flashcp bench mixes` on the same lengths."""
    with planned.open(encoding="utf-8", newline="") as lines:
        counted = {(row["case"], row["provider"], row["metric"]): row["median"] for row in csv.DictReader(lines)}
    head = (
        "model", "window, ranks", "largest imbalance: the mix's plan, the causal one's",
        "critical rows: a layer that sees all, a window layer", "over llama3", "over per_document",
        "over the fastest best effort",
    )  # fmt: skip
    table = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for one in mixed(Numbers(simulated)):
        size = f"{one.case.context // 1024}K"
        case = f"{WORKLOADS[one.model]} {one.case.data} {size} N={one.case.ranks}"
        balance = [float(counted[case, plan, "imbalance_max"]) for plan in ("flashcp", "flashcp_causal")]
        rows = [counted.get((case, "flashcp", f"critical_rows_{kind}")) for kind in ("causal", "window")]
        published, rival, ours = one.speedups
        cells = (
            one.model, f"{size}, {one.case.ranks}", ", ".join(f"{number:.3f}" for number in balance),
            ", ".join(f"{float(number):,.0f}" if number else "-" for number in rows), f"{ours:.2f}",
            f"{ours / published:.2f}", f"{ours / rival:.2f} ({one.rival})",
        )  # fmt: skip
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def test_the_page_of_masks_shows_the_committed_rows() -> None:
    results = ROOT / "experiments/results"
    table = worth_table(read_rows(results / "paper/mixes"), results / "planner_mixes.csv")
    assert table.count("\n") == 2 + 18 - 1
    assert table in (ROOT / "docs/masks.md").read_text()
