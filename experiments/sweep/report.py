"""`flashcp report DIRECTORY`: table, figure and pages of a sweep, from its results.csv."""

from __future__ import annotations

import base64
import csv
import io
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flashcp.experiments.bench.calibration import DIRECTIONS, read_times
from flashcp.experiments.cli import show
from flashcp.experiments.folders import check_file, write_whole
from flashcp.experiments.folders import render as fill
from flashcp.experiments.lab.page import PAGE as LAB_PAGE
from flashcp.experiments.lab.page import check_lab, draw_lab, is_lab, lab_folders, lab_table, write_lab_page
from flashcp.experiments.paper.figures import FIGURES, paper_folders, publish_figure, write_paper_page
from flashcp.experiments.paper.figures import PAGE as PAPER_PAGE
from flashcp.experiments.plots import TIME_COLOURS, comparison_figure
from flashcp.experiments.sweep.compare import LOSS_TOLERANCE, Comparison, columns, compare, step_parts
from flashcp.experiments.sweep.results import (
    EMULATED,
    LEFT_OUT,
    MEASURED,
    NO_OVERLAP,
    REFERENCE,
    RESULTS,
    Row,
    label,
    read_rows,
)
from flashcp.files import read_path
from flashcp.sharding.methods import METHODS
from flashcp.text import table

WORDS = "DIRECTORY [baseline=NAME] [page=FILE]"
FIGURE, PAGE, MARKDOWN = "comparison.png", "dashboard.html", "report.md"
BASELINE = "llama3"
SHARES = (-0.1, 1.1)  # where `hidden` is a share, give or take a tenth
Failures = Mapping[tuple[str, str], str]
"""Why runs failed, by case and provider."""


def main(arguments: Sequence[str]) -> int:
    """Rebuild everything in the directory that is made from rows: of a sweep or a lab, or of several below it."""
    folders = [argument for argument in arguments if "=" not in argument]
    options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    for key in options.keys() - {"baseline", "page"}:
        raise ValueError(f"{key}: no such override; expected baseline, or page for labs and the paper's figures")
    if len(folders) != 1:
        raise ValueError(f"{len(folders)} directories given: expected one that holds {RESULTS}")
    folder = read_path(folders[0], "directory")
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such directory; expected one that holds {RESULTS}")
    if paper_folders(folder):
        page = Path(options.get("page", folder / PAPER_PAGE))
        check_file(page, "page")
        _check_calibrations(folder)
        print(f"wrote {write_paper_page(folder, page)}", file=sys.stderr)
        return 0
    if lab_folders(folder):
        page = Path(options.get("page", folder / LAB_PAGE))
        check_file(page, "page")
        print(f"wrote {write_lab_page(folder, page)}", file=sys.stderr)
        return 0
    if "page" in options:
        raise ValueError(
            f"page={options['page']}: expected the directory above several labs, or the paper's, not {folder}"
        )
    if not (folder / RESULTS).is_file():
        raise ValueError(f"{folder}: no {RESULTS} in it; expected the directory of a sweep")
    rows = read_rows(folder)
    if not rows and not read_failures(folder):
        raise ValueError(f"{folder / RESULTS}: no rows in it, and no failed run beside it")
    if is_lab(rows):
        check_lab(rows, folder / RESULTS)
        check_file(folder / "lab.png", "report")
        draw_lab(rows, folder / "lab.png")
        show({"rows": [vars(row) for row in rows]}, lab_table(rows))
    elif all(label(row.kind) in (MEASURED, EMULATED, LEFT_OUT) for row in rows):
        overlaps = any(row.provider == NO_OVERLAP for row in rows)
        publish(folder, read_baseline(options.get("baseline", NO_OVERLAP if overlaps else BASELINE), "baseline"))
    else:
        show_rows(rows, publish_figure(_figure_name(folder), rows, folder))
    return 0


def show_rows(rows: Sequence[Row], text: str) -> None:
    """The rows of a simulation where JSON was asked for, and how far they are from the paper."""
    show({"rows": [vars(row) for row in rows]}, text, aside=True)


def _figure_name(folder: Path) -> str:
    """The figure that a sweep that simulates drew: the folder's name, or that of a picture in it."""
    names = [folder.resolve().name, *(picture.stem for picture in sorted(folder.glob("*.png")))]
    found = next((name for name in names if name in FIGURES), "")
    if not found:
        expected = f"a folder or a picture in it named {', '.join(FIGURES)}"
        raise ValueError(f"{folder}: simulated rows of an unknown figure; expected {expected}")
    return found


def _check_calibrations(folder: Path) -> None:
    """Raise ValueError naming the file of a calibration that no picture can be made of."""
    for file in sorted((folder / "calibration").glob("*.csv")):
        try:
            times = read_times(file)
        except (TypeError, ValueError, csv.Error) as error:
            raise ValueError(f"{file}: not the times of a calibration ({error})") from error
        checked = {row.direction for row in times if row.split == "check"}
        if checked != set(DIRECTIONS):
            raise ValueError(f"{file}: expected rows that check {' and '.join(DIRECTIONS)}")
        if not all(0 < us < math.inf for row in times for us in (row.measured_us, row.predicted_us)):
            raise ValueError(f"{file}: not the times of a calibration (measured_us and predicted_us: expected > 0)")


def read_baseline(name: str, field: str) -> str:
    """The provider that speedups are over: a method, or a pair that is no method, or overlap `none`.

    Raises ValueError for other names.
    """
    if name not in METHODS and "+" not in name and name != NO_OVERLAP:
        also = f"a pair SHARDING+EXCHANGE, or {NO_OVERLAP} to compare levels of overlap"
        raise ValueError(f"{field}={name!r}: expected one of {', '.join(METHODS)}, {also}")
    return name


def publish(folder: Path, baseline: str) -> Comparison:
    """Print the table (or one JSON document); write the figure and the pages beside the rows."""
    rows, failures = read_rows(folder), read_failures(folder)
    comparison = compare(rows, baseline)
    text = render(comparison, failures)
    if rows:
        for name in (FIGURE, PAGE, MARKDOWN):
            check_file(folder / name, "report")
        figure, drawn = comparison_figure(comparison), io.BytesIO()
        figure.savefig(folder / FIGURE, dpi=160)
        figure.set_layout_engine("none")  # as it was laid out; once more takes as long again
        figure.savefig(drawn, format="svg")
        told = {**_told(comparison, failures), **_page(comparison, rows), "title": folder.resolve().name}
        told["svg"] = base64.b64encode(drawn.getvalue()).decode()
        for name, template in ((PAGE, "dashboard.html.j2"), (MARKDOWN, "report.md.j2")):
            write_whole(folder / name, fill(Path(__file__).with_name(template), **told))
        text += f"\n\n{'  '.join(str(folder / name) for name in (RESULTS, FIGURE, PAGE, MARKDOWN))}"
    document = {
        "baseline": baseline,
        "methods": [{"name": line.provider, **line._asdict()} for line in comparison.lines],
        "failures": [{"case": case, "name": name, "error": error} for (case, name), error in failures.items()],
    }
    show(document, text)
    return comparison


def read_failures(folder: Path) -> Failures:
    """Why runs of a sweep failed."""
    files = sorted(folder.glob("jobs/*/*/failure.txt"))
    return {(file.parent.parent.name, file.parent.name): file.read_text(encoding="utf-8").strip() for file in files}


def render(comparison: Comparison, failures: Failures) -> str:
    """The table of every case, and under it what the numbers do not say."""
    told = _told(comparison, failures)
    head = [told["first"], *(column.title for column in told["columns"])]
    tables = []
    for case in dict.fromkeys([*comparison.cases, *(case for case, _ in failures)]):
        body = [[line.provider, *(column.cell(line) for column in told["columns"])] for line in comparison.of(case)]
        body += [[provider, *[""] * (len(head) - 1)] for failed, provider in failures if failed == case]
        tables.append((comparison.title(case), table(head, body)))
    if told["by_factor"]:
        tables.append((f"speedup over {comparison.over}, by case", table(*told["by_factor"])))
    return fill(Path(__file__).with_name("report.txt.j2"), tables=tables, **told).rstrip()


def _told(comparison: Comparison, failures: Failures) -> dict[str, Any]:
    """What text and pages tell."""
    emulated = [(case, f"is {EMULATED}: {how}") for case, how in comparison.emulated.items()]
    left_out = [line for line in comparison.runs if label(line.kind) == LEFT_OUT]
    hidden, worst = comparison.table.hidden.dropna(), comparison.worst_difference
    return {
        "comparison": comparison,
        "first": "overlap" if comparison.of_overlap else "method",
        "columns": columns(comparison),
        "by_factor": comparison.by_factor() if comparison.factors and not comparison.of_overlap else None,
        "means": {kind: means for kind in comparison.kinds if (means := comparison.mean_speedups(kind))},
        "failures": failures,
        "remarks": emulated + [(line.case, f"{line.provider}: {line.kind}") for line in left_out],
        "is_hidden_told": hidden.between(*SHARES).all(),  # attention varies between runs
        "worst": worst,
        "agrees": worst is None or worst.loss_difference <= LOSS_TOLERANCE,
        "tolerance": LOSS_TOLERANCE,
    }


def _page(comparison: Comparison, rows: Sequence[Row]) -> dict[str, Any]:
    """What pages tell besides."""
    frame = comparison.table[comparison.table.provider != REFERENCE]
    hiding = frame[frame.hidden.between(*SHARES) & (frame.hidden != 0)].groupby("case", sort=False).hidden.idxmax()
    compared = [row for row in rows if row.metric != LEFT_OUT]
    dates = [row.date for row in rows]
    runs = comparison.runs
    return {
        "providers": {line.provider for line in runs},
        "steps": sorted({len(line.losses) for line in comparison.lines}),
        "kinds": " and ".join(dict.fromkeys(label(row.kind) for row in compared)),
        "devices": _several(row.device for row in compared),
        "hiding": [comparison.lines[place] for place in hiding],
        "balanced": [line for line in runs if line.provider == comparison.baseline and line.imbalance is not None],
        "saving": max(runs, key=lambda line: line.saving or 0.0, default=None),
        "longest": frame.groupby("case").step_ms.max().fillna(1.0).to_dict(),
        "parts": TIME_COLOURS,
        "step_parts": step_parts,
        "single": REFERENCE,
        "figure": FIGURE,
        "provenance": {
            "numbers": _several(row.kind for row in rows),
            **{field: _several(getattr(row, field) for row in rows) for field in ("device", "versions", "commit")},
            "date": " to ".join(dict.fromkeys((min(dates), max(dates)))),
            "rows": f"{len(rows)} in {RESULTS} beside this page; `flashcp report DIRECTORY` makes the page from them",
        },
    }


def _several(values: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(values))
