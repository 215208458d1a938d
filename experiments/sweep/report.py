"""`flashcp report DIRECTORY`: table, figure and page of a sweep, from its results.csv."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from flashcp.experiments.bench.calibration.times import DIRECTIONS, read_times
from flashcp.experiments.folders import check_file
from flashcp.experiments.paper.figures import FIGURES, publish_figure
from flashcp.experiments.paper.page import PAGE as PAPER_PAGE
from flashcp.experiments.paper.page import paper_folders, write_paper_page
from flashcp.experiments.sweep.columns import columns
from flashcp.experiments.sweep.comparison import LOSS_TOLERANCE, NO_OVERLAP, Comparison, compare
from flashcp.experiments.sweep.dashboard import write_dashboard
from flashcp.experiments.sweep.figure import draw_comparison
from flashcp.experiments.sweep.rows import RESULTS, Row, read_rows
from flashcp.sharding.methods import METHODS
from flashcp.text import table

__all__ = ["FIGURE", "PAGE", "main", "publish", "read_baseline"]

FIGURE, PAGE = "comparison.png", "dashboard.html"
BASELINE = "llama3"


def main(arguments: Sequence[str], as_json: bool = False) -> int:
    """Rebuild everything in the directory that is made from rows: of one sweep, or of the paper's figures below it."""
    folders = [argument for argument in arguments if "=" not in argument]
    options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    for key in options.keys() - {"baseline", "page"}:
        raise ValueError(f"{key}: no such override; expected baseline, or page for the paper's figures")
    if len(folders) != 1:
        raise ValueError(f"{len(folders)} directories given: expected one that holds {RESULTS}")
    folder = Path(folders[0])
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such directory; expected one that holds {RESULTS}")
    if paper_folders(folder):
        page = Path(options.get("page", folder / PAPER_PAGE))
        check_file(page, "page")
        _check_calibrations(folder)
        print(f"wrote {write_paper_page(folder, page)}", file=sys.stderr)
        return 0
    if not (folder / RESULTS).is_file():
        raise ValueError(f"{folder}: no {RESULTS} in it; expected the directory of a sweep")
    if not read_rows(folder) and not read_failures(folder):
        raise ValueError(f"{folder / RESULTS}: no rows in it, and no failed run beside it")
    rows = read_rows(folder)
    if any(row.kind != "measured" for row in rows):
        text = publish_figure(_figure_name(folder), rows, folder)
        print(text, file=sys.stderr if as_json else sys.stdout)
        if as_json:
            print(json.dumps({"rows": [vars(row) for row in rows]}, indent=1))
        return 0
    publish(folder, read_baseline(options.get("baseline", _baseline(rows)), "baseline"), as_json)
    return 0


def _figure_name(folder: Path) -> str:
    """The figure that a sweep that simulates drew: the folder's name, or that of a picture in it."""
    names = [folder.resolve().name, *(picture.stem for picture in sorted(folder.glob("*.png")))]
    found = next((name for name in names if name in FIGURES), "")
    if not found:
        raise ValueError(
            f"{folder}: simulated rows of an unknown figure; expected a folder or a picture in it named "
            f"{', '.join(FIGURES)}"
        )
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


def _baseline(rows: Sequence[Row]) -> str:
    """What a sweep's rows are compared with when nobody says."""
    return NO_OVERLAP if any(row.provider == NO_OVERLAP for row in rows) else BASELINE


def read_baseline(name: str, field: str) -> str:
    """The provider that speedups are over: a method, or a pair that is no method, or overlap `none`.

    Raises ValueError for other names.
    """
    if name not in METHODS and "+" not in name and name != NO_OVERLAP:
        raise ValueError(
            f"{field}={name!r}: expected one of {', '.join(METHODS)}, a pair SHARDING+EXCHANGE, or {NO_OVERLAP} to "
            "compare levels of overlap"
        )
    return name


def publish(folder: Path, baseline: str, as_json: bool) -> Comparison:
    """Print the table (or one JSON document); write the figure and the page beside the rows."""
    rows = read_rows(folder)
    failures = read_failures(folder)
    comparison = compare(rows, baseline)
    if rows:
        draw_comparison(comparison, folder / FIGURE)
        write_dashboard(folder / PAGE, folder.resolve().name, comparison, rows, failures)
    if as_json:
        print(json.dumps(_document(comparison, failures), indent=1))
    else:
        print(render(comparison, failures))
        if rows:
            print(f"\n{folder / RESULTS}  {folder / FIGURE}  {folder / PAGE}")
    return comparison


def read_failures(folder: Path) -> dict[tuple[str, str], str]:
    """Why runs failed, by case and provider."""
    files = sorted(folder.glob("jobs/*/*/failure.txt"))
    return {(file.parent.parent.name, file.parent.name): file.read_text(encoding="utf-8").strip() for file in files}


def render(comparison: Comparison, failures: dict[tuple[str, str], str]) -> str:
    """The table of every case, and under it what the numbers do not say."""
    chosen = columns(comparison)
    head = ["overlap" if comparison.of_overlap else "method", *(column.title for column in chosen)]
    parts = []
    for case in dict.fromkeys([*comparison.cases, *(case for case, _ in failures)]):
        lines = [line for line in comparison.lines if line.case == case]
        body = [[line.provider, *(column.cell(line) for column in chosen)] for line in lines]
        body += [[provider, *[""] * (len(head) - 1)] for failed, provider in failures if failed == case]
        parts.append(f"{case}\n{table(head, body)}")
    notes = [f"failed: {case} {provider}: {error}" for (case, provider), error in failures.items()]
    if (means := comparison.mean_speedups()) and len(comparison.cases) > 2:
        shown = ", ".join(f"{provider} {value:.3f}" for provider, value in means.items())
        notes.append(f"speedup over {comparison.baseline}, geometric mean over cases: {shown}")
    if any(line.hidden is not None and not line.is_hidden_told for line in comparison.lines):
        notes.append("hidden is not within 0 and 1: attention varied too much between the runs")
    if worst := comparison.worst_difference:
        verdict = "within" if (worst.loss_difference or 0) <= LOSS_TOLERANCE else "beyond"
        notes.append(
            f"largest relative difference of a loss from the single process: {worst.loss_difference:.1e} "
            f"({worst.provider}), {verdict} {LOSS_TOLERANCE:.0e}"
        )
    return "\n\n".join([*parts, "\n".join(notes)]).rstrip()


def _document(comparison: Comparison, failures: dict[tuple[str, str], str]) -> dict[str, object]:
    return {
        "baseline": comparison.baseline,
        "methods": [{"name": line.provider, **vars(line)} for line in comparison.lines],
        "failures": [{"case": case, "name": provider, "error": error} for (case, provider), error in failures.items()],
    }
