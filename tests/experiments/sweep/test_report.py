"""Reports from rows: what is compared with what, what stays empty, and pages that need nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from flashcp.experiments.cli.main import main
from flashcp.experiments.plots import comparison_figure
from flashcp.experiments.sweep.compare import compare, step_parts
from flashcp.experiments.sweep.report import render
from flashcp.experiments.sweep.results import REFERENCE, RESULTS, Row, read_rows, write_rows
from tests.checkout import ROOT

MakeRows = Callable[..., list[Row]]


def test_rows_survive_the_file(tmp_path: Path, make_rows: MakeRows) -> None:
    rows = make_rows("llama3", step_ms=1 / 3)
    rows[0] = dataclasses.replace(rows[0], versions='torch "2", numpy 2')
    write_rows(tmp_path, rows)
    assert read_rows(tmp_path) == rows
    assert read_rows(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("case,", "kase,"), "expected the columns case, provider"),
        ((",10.0,", ",ten,"), f"{RESULTS}:2: not a row of results"),
        ((",10.0,", ",nan,"), f"{RESULTS}:2: not a row of results (median=nan: expected a finite number >= 0)"),
        ((",10.0,", ",-1.0,"), f"{RESULTS}:2: not a row of results (median=-1.0: expected a finite number >= 0)"),
        ((",10.0,", f",{'1' * 200_000},"), f"{RESULTS}:1: not a row of results (field larger than field limit"),
    ],
)
def test_file_that_holds_no_rows_is_one_line(
    refused: Callable[..., str], tmp_path: Path, make_rows: MakeRows, change: tuple[str, str], message: str
) -> None:
    write_rows(tmp_path, make_rows("llama3"))
    text = (tmp_path / RESULTS).read_text()
    (tmp_path / RESULTS).write_text(text.replace(*change, 1))
    assert message in refused("report", str(tmp_path))


def test_binary_file_and_one_without_rows_are_one_line(refused: Callable[..., str], tmp_path: Path) -> None:
    write_rows(tmp_path, [])
    assert refused("report", str(tmp_path)).startswith(f"{tmp_path / RESULTS}: no rows in it")
    (tmp_path / RESULTS).write_bytes(b"\xff\xfe\x00")
    assert refused("report", str(tmp_path)).startswith(f"{tmp_path / RESULTS}: not a file of results")


@pytest.mark.parametrize("change", [lambda text: text[:-40], lambda text: text[:-1] + ",more\n"])
def test_rows_that_are_cut_short_or_too_long_are_one_line(
    refused: Callable[..., str], tmp_path: Path, make_rows: MakeRows, change: Callable[[str], str]
) -> None:
    write_rows(tmp_path, make_rows("llama3"))
    file = tmp_path / RESULTS
    file.write_text(change(file.read_text()))
    last = len(file.read_text().splitlines())
    assert refused("report", str(tmp_path)) == f"{file}:{last}: not a row of results (expected one value a column)"


def test_a_figure_that_cannot_be_written_is_one_line(
    refused: Callable[..., str], tmp_path: Path, make_rows: MakeRows
) -> None:
    write_rows(tmp_path, make_rows("llama3"))
    (tmp_path / "comparison.png").mkdir()
    assert "comparison.png': cannot be written (Is a directory)" in refused("report", str(tmp_path))
    assert {file.name for file in tmp_path.iterdir()} == {RESULTS, "comparison.png"}


def test_loss_of_zero_on_the_single_process_divides_nothing(make_rows: MakeRows) -> None:
    rows = [*make_rows(REFERENCE, losses=(0.0, 0.0), config="alone")]
    rows += make_rows("llama3", losses=(0.0, 0.5), reference="alone")
    assert compare(rows, "llama3").lines[0].loss_difference == 1.0


def test_comparison(make_rows: MakeRows) -> None:
    rows = [
        *make_rows(REFERENCE, losses=(2.0, 1.0), case="stdlib-c8k-n1", config="alone"),
        *make_rows("flashcp", step_ms=5.0, losses=(2.0, 1.0002), reference="alone"),
        *make_rows("llama3", step_ms=10.0, losses=(2.0001, 1.0), reference="alone"),
    ]
    llama3, flashcp, alone = compare(rows, "llama3").lines
    assert [line.provider for line in (llama3, flashcp, alone)] == ["llama3", "flashcp", REFERENCE]
    assert (llama3.speedup, flashcp.speedup, alone.speedup) == (1.0, 2.0, None)
    assert llama3.loss_difference == pytest.approx(5e-5)
    assert flashcp.loss_difference == pytest.approx(2e-4)
    worst = compare(rows, "llama3").worst_difference
    assert worst
    assert worst.provider == "flashcp"
    assert "2.0e-04 (flashcp), beyond 1e-04" in render(compare(rows, "llama3"), {})


def test_missing_baseline_and_reference_are_empty_cells(make_rows: MakeRows) -> None:
    comparison = compare(make_rows("flashcp", reference="gone"), "llama3")
    (line,) = comparison.lines
    assert (line.speedup, line.loss_difference, comparison.worst_difference) == (None, None, None)
    assert line.missing == "no llama3"
    assert comparison.mean_speedups() == {}
    shown = render(comparison, {("stdlib-c8k-n2", "llama3"): "rank 1 of 2: RuntimeError: no"})
    assert "no llama3" in shown.splitlines()[3]
    assert "failed: stdlib-c8k-n2 llama3: rank 1 of 2: RuntimeError: no" in shown
    assert [text.split()[0] for text in shown.splitlines()[3:5]] == ["flashcp", "llama3"]


def test_a_sweep_that_has_only_begun_can_be_looked_at(make_rows: MakeRows) -> None:
    assert compare(make_rows(REFERENCE, config="alone"), "llama3").runs == []


def test_a_speedup_in_turns_is_the_median_of_the_ratios_within_a_turn(make_rows: MakeRows) -> None:
    def turns(provider: str, times: tuple[float, ...], begun: float = 7.0) -> list[Row]:
        rows = make_rows(provider)
        turn = [dataclasses.replace(rows[0], metric="turn_ms", step=i, median=t) for i, t in enumerate(times, start=1)]
        return [*rows, *turn, dataclasses.replace(rows[0], metric="turns", median=begun)]

    rows = turns("llama3", (900, 900, 900, 10, 40, 10, 10, 10))  # the load of one turn slows both
    rows += turns("faster", (5, 5, 5, 5, 20, 5, 4, 5)) + turns("alike", (5, 5, 5, 9, 44, 9, 11, 10))
    rows += turns("later", (5, 5, 5, 5, 5, 5, 5, 5), begun=8.0)
    llama3, faster, alike, later = compare(rows, "llama3").lines
    assert (llama3.speedup, faster.speedup) == (1.0, 2.0)
    assert faster.speedup_p20 == 2.0
    assert alike.speedup_p20 < 1 < alike.speedup_p80
    assert (later.speedup, later.speedup_p20) == (1.0, None)  # medians: their turns were others'
    shown = render(compare(rows, "llama3"), {})
    assert "2.00 (2.00 - 2." in shown
    assert "not told apart (0.9" in shown
    assert "1.000 (other turns)" in shown


def test_speedups_over_cases_are_geometric_means(make_rows: MakeRows) -> None:
    rows = []
    for case, ms in (("a", 5.0), ("b", 20.0)):
        rows += make_rows("llama3", case=case, config=f"l{case}")
        rows += make_rows("flashcp", ms, case=case, config=f"f{case}")
    rows += make_rows("ring", 2.0, case="a")
    means = compare(rows, "llama3").mean_speedups()
    assert means == {"llama3": 1.0, "flashcp": pytest.approx(math.sqrt(2 * 0.5))}  # ring is missing in case b


class Links(HTMLParser):
    """Tags that are open, and every address."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_rebuilds_figure_and_page(
    tmp_path: Path, make_rows: MakeRows, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows("llama3", reference="alone") + make_rows("<flash&cp>", 5.0, reference="alone")
    write_rows(tmp_path, rows + make_rows(REFERENCE, config="alone", case="one"))
    assert main(["report", str(tmp_path)]) == 0
    assert "2.000" in capsys.readouterr().out
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "dashboard.html").read_text()
    links = Links()
    links.feed(page)
    assert links.open == []
    assert [address[:26] for address in links.addresses] == ["data:image/svg+xml;base64,"]
    assert "&lt;flash&amp;cp&gt;" in page
    assert "url(" not in page
    assert "@import" not in page
    markdown = (tmp_path / "report.md").read_text()
    assert "![step times and losses](comparison.png)" in markdown
    assert "| <flash&cp> | 1.250 | 0.500 | 2 | 1.0 | 5 | 2.000 | 1.00000 | 0.0e+00 |" in markdown
    assert "- device: cpu\n" in markdown
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "comparison.png",
        "dashboard.html",
        "report.md",
        RESULTS,
    ]


def test_report_takes_another_baseline(tmp_path: Path, make_rows: MakeRows, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path, make_rows("llama3", 10.0) + make_rows("ring", 20.0))
    assert main(["report", str(tmp_path), "baseline=ring"]) == 0
    assert "speedup over ring" in capsys.readouterr().out


def test_runs_of_other_settings_have_no_speedup_over_the_baseline(make_rows: MakeRows) -> None:
    rows = [*make_rows("llama3", reference="four steps"), *make_rows("ring", reference="four steps")]
    rows += make_rows("flashcp", reference="two steps")
    speedups = {line.provider: line.speedup for line in compare(rows, "llama3").lines}
    assert speedups == {"llama3": 1.0, "ring": 1.0, "flashcp": None}
    assert "other settings" in render(compare(rows, "llama3"), {})


def test_what_differs_between_cases_is_a_column_and_an_axis(
    tmp_path: Path, make_rows: MakeRows, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for ranks, ms in ((2, 5.0), (4, 8.0)):
        for rate in ("1e-05", "0.1"):
            case = f"stdlib-c8k-n{ranks}-loop.lr={rate}"
            rows += make_rows("llama3", case=case, config=f"l{case}")
            rows += make_rows("flashcp", ms, case=case, config=f"f{case}") if (ranks, rate) != (4, "0.1") else []
    comparison = compare(rows, "llama3")
    assert comparison.factors == ["world_size", "loop.lr"]
    assert comparison.table[["provider", "world_size", "loop.lr"]].iloc[-1].tolist() == ["llama3", "4", "0.1"]
    assert comparison.by_factor() == (
        ["world_size, loop.lr", "2, 1e-05", "2, 0.1", "4, 1e-05", "4, 0.1"],
        [["llama3", *["1.000"] * 4], ["flashcp", "2.000", "2.000", "1.250", ""]],
    )
    axes = comparison_figure(comparison).subfigs[1].axes[0]
    assert axes.get_xlabel() == "world_size, loop.lr"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2, 1e-05", "2, 0.1", "4, 1e-05", "4, 0.1"]
    assert [line.get_ydata()[:3].tolist() for line in axes.lines] == [[1, 1, 1], [2, 2, 1.25]]
    write_rows(tmp_path, rows)
    assert main(["report", str(tmp_path)]) == 0
    assert "speedup over llama3, by case" in capsys.readouterr().out
    for page in ("report.md", "dashboard.html"):
        assert "world_size, loop.lr" in (tmp_path / page).read_text()
    assert "| flashcp | 2.000 | 2.000 | 1.250 |  |" in (tmp_path / "report.md").read_text()
    one_case = compare(rows[:9], "llama3")
    assert (one_case.factors, one_case.cases) == ([], ["stdlib-c8k-n2-loop.lr=1e-05"])


def overlap_rows(make_rows: MakeRows) -> list[Row]:
    """Two implementations of attention: what `fused` waits is in its attention."""
    rows = []
    for case, scale in (("attention=cpu", 1), ("attention=triton", 10)):
        rows += make_rows("staged", 120 * scale, case=case, attention_ms=110 * scale, exposed_ms=0)
        rows += make_rows("none", 160 * scale, case=case, attention_ms=100 * scale, exposed_ms=40 * scale)
    return rows + make_rows("fused", 1130, case="attention=triton", attention_ms=1100, exposed_ms=10)


def test_levels_of_overlap_are_compared_on_each_case(make_rows: MakeRows) -> None:
    lines = compare(overlap_rows(make_rows), "none").lines
    assert [(line.provider, line.exposed_ms, line.hidden) for line in lines] == [
        ("none", 40.0, 0.0),
        ("staged", 10.0, 0.75),
        ("none", 400.0, 0.0),
        ("staged", 100.0, 0.75),
        ("fused", 110.0, 0.725),
    ]
    assert [line.speedup for line in lines[:2]] == [1.0, pytest.approx(160 / 120)]
    assert step_parts(lines[-1]) == {"attention": 1000.0, "exchange": 110.0, "rest": 20.0}
    assert "hidden is not within 0 and 1" not in render(compare(overlap_rows(make_rows), "none"), {})
    noisy = [*overlap_rows(make_rows), *make_rows("auto", 130, case="attention=cpu", attention_ms=70)]
    assert "hidden is not within 0 and 1: attention varied" in render(compare(noisy, "none"), {})
    assert {line.exposed_ms for line in compare(overlap_rows(make_rows), "llama3").lines} == {None}
    alone = make_rows("staged", case="attention=cpu")
    assert [(line.exposed_ms, line.hidden) for line in compare(alone, "none").lines] == [(None, None)]


def test_overlap_has_columns_of_its_own(
    tmp_path: Path, make_rows: MakeRows, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path, overlap_rows(make_rows))
    assert main(["report", str(tmp_path)]) == 0  # rows of overlap `none`: that is the baseline
    shown = capsys.readouterr().out.splitlines()
    heads = ["overlap", "exposed ms", "hidden", "wait ms", "attention ms", "step ms", "speedup over overlap none"]
    assert re.split("  +", shown[1].strip())[:7] == heads
    assert shown[4].split() == ["staged", "10.0", "0.75", "0.5", "110", "120", "1.333", "1.00000"]
    page = (tmp_path / "dashboard.html").read_text()
    assert "<b>75%</b><span>of the exchange hidden by staged: attention=triton</span>" in page
    assert "3 levels of overlap" in page
    markdown = (tmp_path / "report.md").read_text()
    assert f"| {' | '.join(heads)} |" in markdown
    assert "| staged | 10.0 | 0.75 | 0.5 | 110 | 120 | 1.333 | 1.00000 |  |" in markdown


PAPER = ROOT / "experiments/results/paper"


def test_rows_of_a_simulation_redraw_its_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "paper_fig3"
    folder.mkdir()
    shutil.copy(PAPER / "paper_fig3/results.csv", folder)
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.startswith("paper_fig3: attention kernels alone")
    assert sorted(file.name for file in folder.iterdir()) == ["paper_fig3.png", RESULTS]
    moved = folder.rename(tmp_path / "mine")  # its picture still says what it is
    (moved / "paper_fig3.png").write_bytes(b"")
    assert main(["report", str(moved), "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["rows"]) == len(read_rows(moved))
    assert "numbers that should come out" in err
    assert (moved / "paper_fig3.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_a_simulation_without_a_figure_are_one_line(refused: Callable[..., str], tmp_path: Path) -> None:
    shutil.copy(PAPER / "paper_fig3/results.csv", tmp_path)
    assert "simulated rows of an unknown figure; expected a folder or" in refused("report", str(tmp_path))


@pytest.mark.parametrize("page", ["taken", "/proc/x.md", "file/x.md"])
def test_a_page_that_cannot_be_written_is_one_line(refused: Callable[..., str], tmp_path: Path, page: str) -> None:
    (tmp_path / "paper_fig3").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_text("mine")
    shutil.copy(PAPER / "paper_fig3/results.csv", tmp_path / "paper_fig3")
    assert refused("report", str(tmp_path), f"page={page}").startswith("page=")


@pytest.mark.parametrize("change", ["header", "short", "word", "zero", "binary"])
def test_a_calibration_that_cannot_be_drawn_is_one_line(
    refused: Callable[..., str], tmp_path: Path, change: str
) -> None:
    lines = (PAPER / "calibration/this_machine.csv").read_text().splitlines(keepends=True)
    head, row = lines[0], next(line for line in lines if ",check," in line)
    times = row.split(",")[7]
    bad = {"header": b"", "short": b"1,check,forward\n", "binary": b"\xff\xfe"}
    bad |= {"word": row.replace(times, "ten").encode(), "zero": row.replace(times, "0.0").encode()}
    for name in ("calibration", "paper_fig3"):
        (tmp_path / name).mkdir()
    shutil.copy(PAPER / "paper_fig3/results.csv", tmp_path / "paper_fig3")
    both = "".join(lines[1:]).encode() if change != "header" else b""
    (tmp_path / "calibration/mine.csv").write_bytes(head.encode() + both + bad[change])
    assert refused("report", str(tmp_path)).startswith(f"{tmp_path / 'calibration/mine.csv'}: ")
