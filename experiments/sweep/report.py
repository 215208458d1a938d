"""`flashcp report DIRECTORY`: table, figure and pages of a sweep, from its results.csv."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flashcp.experiments.bench.calibration import DIRECTIONS, read_times
from flashcp.experiments.cli.verbs import AS_JSON
from flashcp.experiments.folders import check_file, write_whole
from flashcp.experiments.folders import render as fill
from flashcp.experiments.paper.figures import FIGURES, paper_folders, publish_figure, write_paper_page
from flashcp.experiments.paper.figures import PAGE as PAPER_PAGE
from flashcp.experiments.plots import PARTS, comparison_figure
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
from flashcp.sharding.methods import METHODS
from flashcp.text import table

__all__ = ["FIGURE", "PAGE", "main", "publish", "read_baseline"]

FIGURE, PAGE, MARKDOWN = "comparison.png", "dashboard.html", "report.md"
BASELINE = "llama3"


def main(arguments: Sequence[str]) -> int:
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
    if any(label(row.kind) not in (MEASURED, EMULATED, LEFT_OUT) for row in rows):
        text = publish_figure(_figure_name(folder), rows, folder)
        print(text, file=sys.stderr if AS_JSON.get() else sys.stdout)
        if AS_JSON.get():
            print(json.dumps({"rows": [vars(row) for row in rows]}, indent=1))
        return 0
    publish(folder, read_baseline(options.get("baseline", _baseline(rows)), "baseline"))
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


def publish(folder: Path, baseline: str) -> Comparison:
    """Print the table (or one JSON document); write the figure and the pages beside the rows."""
    rows = read_rows(folder)
    failures = read_failures(folder)
    comparison = compare(rows, baseline)
    if rows:
        for name in (FIGURE, PAGE, MARKDOWN):
            check_file(folder / name, "report")
        figure, drawn = comparison_figure(comparison), io.BytesIO()
        figure.savefig(folder / FIGURE, dpi=160)
        figure.set_layout_engine("none")  # as it was laid out; once more takes as long again
        figure.savefig(drawn, format="svg")
        told = _told(folder.resolve().name, comparison, rows, failures)
        told["svg"] = base64.b64encode(drawn.getvalue()).decode()
        for name, template in ((PAGE, "dashboard.html.j2"), (MARKDOWN, "report.md.j2")):
            write_whole(folder / name, fill(Path(__file__).with_name(template), **told))
    if AS_JSON.get():
        print(json.dumps(_document(comparison, failures), indent=1))
    else:
        print(render(comparison, failures))
        if rows:
            print(f"\n{folder / RESULTS}  {folder / FIGURE}  {folder / PAGE}  {folder / MARKDOWN}")
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
        parts.append(f"{comparison.title(case)}\n{table(head, body)}")
    if len(comparison.factors) and not comparison.of_overlap:
        parts.append(f"speedup over {comparison.over}, by case\n{table(*comparison.by_factor())}")
    notes = [f"failed: {case} {provider}: {error}" for (case, provider), error in failures.items()]
    notes += [f"{case} {line}" for case, line in _remarks(comparison)]
    for kind in comparison.kinds:
        if (means := comparison.mean_speedups(kind)) and len(comparison.cases) > 2:
            shown = ", ".join(f"{provider} {value:.3f}" for provider, value in means.items())
            cases = f"{kind} cases" if comparison.emulated else "cases"
            notes.append(f"speedup over {comparison.baseline}, geometric mean over {cases}: {shown}")
    if not comparison.is_hidden_told:
        notes.append("hidden is not within 0 and 1: attention varied too much between the runs")
    if worst := comparison.worst_difference:
        verdict = "within" if (worst.loss_difference or 0) <= LOSS_TOLERANCE else "beyond"
        notes.append(
            f"largest relative difference of a loss from the single process: {worst.loss_difference:.1e} "
            f"({worst.provider}), {verdict} {LOSS_TOLERANCE:.0e}"
        )
    return "\n\n".join([*parts, "\n".join(notes)]).rstrip()


def _remarks(comparison: Comparison) -> list[tuple[str, str]]:
    """Cases, and what must be known of them: how a link was slowed, who was left out and why."""
    emulated = [(case, f"is {EMULATED}: {how}") for case, how in comparison.emulated.items()]
    return emulated + [(line.case, f"{line.provider}: {line.kind}") for line in comparison.left_out]


def _document(comparison: Comparison, failures: dict[tuple[str, str], str]) -> dict[str, object]:
    return {
        "baseline": comparison.baseline,
        "methods": [{"name": line.provider, **line._asdict()} for line in comparison.lines],
        "failures": [{"case": case, "name": provider, "error": error} for (case, provider), error in failures.items()],
    }


def _told(
    name: str, comparison: Comparison, rows: Sequence[Row], failures: dict[tuple[str, str], str]
) -> dict[str, Any]:
    """What both templates tell."""
    cases = {case: [line for line in comparison.lines if line.case == case] for case in comparison.cases}
    return {
        "title": name,
        "comparison": comparison,
        "lead": _lead(comparison, rows),
        "tiles": _tiles(comparison),
        "failures": failures,
        "remarks": _remarks(comparison),
        "cases": cases,
        "columns": columns(comparison),
        "longest": {
            case: max((line.step_ms or 0.0 for line in lines if line.provider != REFERENCE), default=0.0) or 1.0
            for case, lines in cases.items()
        },
        "parts": PARTS,
        "step_parts": step_parts,
        "single": REFERENCE,
        "by_factor": comparison.by_factor() if comparison.factors and not comparison.of_overlap else None,
        "figure": FIGURE,
        "provenance": {
            "numbers": _several(row.kind for row in rows),
            "device": _several(row.device for row in rows),
            "versions": _several(row.versions for row in rows),
            "commit": _several(row.commit for row in rows),
            "date": " to ".join(dict.fromkeys((min(row.date for row in rows), max(row.date for row in rows)))),
            "rows": f"{len(rows)} in {RESULTS} beside this page; `flashcp report DIRECTORY` makes the page from them",
        },
    }


def _lead(comparison: Comparison, rows: Sequence[Row]) -> str:
    providers = dict.fromkeys(line.provider for line in comparison.runs)
    counts = sorted({len(line.losses) for line in comparison.lines})
    steps = f"{counts[0]} to {counts[-1]}" if counts[1:] else "".join(map(str, counts))
    told = [row for row in rows if row.metric != LEFT_OUT]
    kinds, devices = " and ".join(dict.fromkeys(label(row.kind) for row in told)), _several(row.device for row in told)
    what = "levels of overlap" if comparison.of_overlap else "methods"
    return f"{len(providers)} {what}, {steps} training steps each, {kinds} on {devices}"


def _tiles(comparison: Comparison) -> list[tuple[str, str]]:
    """Numbers that stand out, and what they are."""
    tiles: list[tuple[str, str]] = []
    runs, baseline = comparison.runs, comparison.baseline
    if comparison.of_overlap:  # the most that was hidden in each case, where it was measured well enough
        for case in comparison.cases:
            lines = [line for line in runs if line.case == case and line.hidden and -0.1 <= line.hidden <= 1.1]
            if best := max(lines, key=lambda line: line.hidden, default=None):
                tiles.append(
                    (f"{100 * min(1.0, best.hidden):.0f}%", f"of the exchange hidden by {best.provider}: {case}")
                )
    else:
        for kind in comparison.kinds:
            if means := comparison.mean_speedups(kind):
                fastest = max(means, key=lambda provider: means[provider])
                what = f"{fastest}, fastest step over {baseline}"
                what = f"no step faster than {baseline}'s" if fastest == baseline else what
                link = " (link slowed: emulated)" if kind == EMULATED else ""
                tiles.append((f"{means[fastest]:.2f}x", f"{what}{link}"))
        if balanced := [line for line in runs if line.imbalance is not None and line.provider == baseline]:
            tiles.append((f"{balanced[0].imbalance:.2f}", f"imbalance of {baseline}; 1 is balanced"))
        if saving := max(runs, key=lambda line: line.saving or 0.0, default=None):
            tiles.append((f"{100 * (saving.saving or 0):.0f}%", f"fewer KV rows than an all-gather: {saving.provider}"))
    if worst := comparison.worst_difference:
        agree = worst.loss_difference <= LOSS_TOLERANCE
        tiles.append(
            (f"{worst.loss_difference:.0e}", f"largest difference of a loss: {'agree' if agree else 'do not agree'}")
        )
    return tiles


def _several(values: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(values))
