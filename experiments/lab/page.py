"""What a lab's rows say: tables and a picture of what was measured beside what was predicted; the page of all labs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from flashcp.experiments.folders import check_file, render
from flashcp.experiments.lab.machine import TAKEN
from flashcp.experiments.plots import spread_bars, styled
from flashcp.experiments.sweep.compare import spread_tells
from flashcp.experiments.sweep.results import RESULTS, Row, read_rows
from flashcp.simulator.summary import BASELINE
from flashcp.text import table

PAGE = "LAB_RESULTS.md"
LARGEST_ERROR = 0.2
"""Of a predicted speedup, before the page asks for a cause."""
CAUSES = "causes.md"
"""Beside a lab's rows: why predictions are off there, in words."""
MOST_TAKEN = 0.1
"""Cores. Where others took more, no speedup is told: links hold back as before, ranks compute more slowly."""
PREDICTED = "predicted_speedup"
FAULTS = {
    "whole_ms": "ms, links whole",
    "half_ms": "ms, one at half",
    "tenth_ms": "ms, one at a tenth",
    "cut_s": "s until a cut is an error on all ranks",
    "silent": "ranks without one",
}
"""Metrics of the faults that a method met, and how tables call them."""
TIMED = ("module_ms", "predicted_ms", "speedup", PREDICTED, "link_mb", "route_mb")
TRAINED = ("train_step_ms", "train_speedup", "loss_difference")
SPREAD = ("speedup", "train_speedup")
"""Metrics that are told with p20 and p80."""
DRAWN = {"speedup": "measured", "predicted_speedup": "predicted before"}


class Line(NamedTuple):
    """A method in a lab. text: its speedup in words. off, off_ms: the predicted speedup and time over the measured one,
    less 1. more: bytes on links over those of routes, less 1.
    """

    method: str
    ms: float
    predicted_ms: float
    speedup: Row
    text: str
    predicted: float
    link_mb: float
    more: float

    @property
    def off(self) -> float:
        return self.predicted / self.speedup.median - 1

    @property
    def off_ms(self) -> float:
        return self.predicted_ms / self.ms - 1


def is_lab(rows: Sequence[Row]) -> bool:
    """Whether a lab made these rows."""
    return any(row.metric == PREDICTED for row in rows)


def check_lab(rows: Sequence[Row], name: object) -> None:
    """Raise ValueError, with the name of where they are from, for rows of a lab that lack some which tables tell."""
    found = {(row.provider, row.metric): row for row in rows}
    wanted = [("lab", "link_gbps"), *((BASELINE, metric) for metric in TIMED)]
    for first, others in ((PREDICTED, TIMED), (TRAINED[0], TRAINED), ("cut_s", tuple(FAULTS))):
        wanted += [(row.provider, metric) for row in rows if row.metric == first for metric in others]
    for provider, metric in wanted:
        row = found.get((provider, metric))
        if row is None or (metric in SPREAD and (row.p20 is None or row.p80 is None or row.median <= 0)):
            raise ValueError(f"{name}: not all of a lab's rows: expected {metric} of {provider}, whole")


def lines(rows: Sequence[Row]) -> list[Line]:
    """A line a method, in the order of the rows."""
    found = {(row.provider, row.metric): row for row in rows}
    busy = _taken(rows) > MOST_TAKEN
    made = []
    for method in dict.fromkeys(row.provider for row in rows if row.metric == PREDICTED):
        told = (found[method, metric].median for metric in TIMED if metric not in SPREAD)
        ms, predicted_ms, predicted, sent, routed = told
        more = sent / routed - 1 if routed else 0.0
        speedup = found[method, "speedup"]
        made.append(Line(method, ms, predicted_ms, speedup, speedup_text(speedup, busy), predicted, sent, more))
    return made


def _taken(rows: Sequence[Row]) -> float:
    """Cores that others took; 0 of rows from before this was measured."""
    return next((row.median for row in rows if row.metric == TAKEN), 0.0)


def lab_table(rows: list[Row]) -> str:
    """A line a method: measured beside predicted; then whole steps and faults, where there were any."""
    body = [
        [line.method, f"{line.ms:.0f}", line.text, f"{line.predicted:.2f}", f"{line.link_mb:.1f}", f"{line.more:+.1%}"]
        for line in lines(rows)
    ]
    head = ["method", "module ms", f"speedup over {BASELINE}", "predicted", "MB on links", "over the routes'"]
    taken = _taken(rows)
    noise = f"\nothers kept {taken:.2f} cores busy that the ranks were to have: nothing is told apart"
    busy = noise if taken > MOST_TAKEN else ""
    parts = [f"{rows[0].case}\n{rows[0].kind}{busy}\n{table(head, body)}", training_table(rows), fault_table(rows)]
    return "\n\n".join(filter(None, parts))


def training_table(rows: Sequence[Row]) -> str:
    """Whole steps; empty where nothing was trained."""
    found = {(row.provider, row.metric): row for row in rows}
    methods = [row.provider for row in rows if row.metric == "train_step_ms"]
    if not methods:
        return ""
    head = ["method", "step ms", f"speedup over {BASELINE}", "largest difference of a loss to one process alone"]
    body = [
        [
            method,
            f"{found[method, 'train_step_ms'].median:.0f}",
            speedup_text(found[method, "train_speedup"]),
            f"{found[method, 'loss_difference'].median:.1e}",
        ]
        for method in methods
    ]
    return table(head, body)


def fault_table(rows: Sequence[Row]) -> str:
    """What methods made of faults; empty where none met any."""
    found = {(row.provider, row.metric): row.median for row in rows if row.metric in FAULTS}
    methods = dict.fromkeys(provider for provider, _ in found)
    if not methods:
        return ""
    head = ["method", *FAULTS.values()]
    body = [[method, *(f"{found[method, metric]:.3g}" for metric in FAULTS)] for method in methods]
    return table(head, body)


def speedup_text(row: Row, busy: bool = False) -> str:
    """`1.24 (1.19 - 1.31)`, or that the turns do not tell the two apart. busy: nor would any."""
    if row.provider == BASELINE:
        return "1"
    assert row.p20 is not None
    assert row.p80 is not None
    spread = f"({row.p20:.2f} - {row.p80:.2f})"
    return f"{row.median:.2f} {spread}" if spread_tells(row.p20, row.p80) and not busy else f"not told apart {spread}"


@styled
def draw_lab(rows: Sequence[Row], path: Path) -> None:
    """Write the picture of one case in the format of the path's suffix."""
    series = {label: [row for row in rows if row.metric == metric] for metric, label in DRAWN.items()}
    figure = Figure(figsize=(8.5, 0.8 + 0.4 * len(series["measured"])))
    axes = figure.subplots()
    spread_bars(axes, series, 1.0)
    axes.axvline(1.0, color="#9aa5b1", linewidth=0.8)
    axes.set_title(rows[0].case)
    axes.set_xlabel(f"times faster than {BASELINE}: median, p20 and p80 over windows")
    figure.savefig(path)


# --- several labs side by side


def lab_folders(folder: Path) -> list[Path]:
    """Directories below that hold a lab's rows, by name."""
    found = (file.parent for file in sorted(folder.glob(f"*/{RESULTS}")))
    return [place for place in found if is_lab(read_rows(place))]


def out_of_order(made: Sequence[Line]) -> list[tuple[str, str]]:
    """Pairs (faster, slower) that the measurement tells apart and the prediction has the other way round.

    Told apart: the ranges of their speedups, p20 to p80, do not meet.
    """
    found = []
    for pair in combinations(made, 2):
        slow, fast = sorted(pair, key=lambda line: line.speedup.median)
        apart = (fast.speedup.p20 or 0.0) > (slow.speedup.p80 or 0.0)
        if apart and fast.predicted <= slow.predicted:
            found.append((fast.method, slow.method))
    return found


def write_lab_page(folder: Path, page: Path) -> Path:
    """Draw the picture of every lab below again and write the page."""
    page.parent.mkdir(parents=True, exist_ok=True)
    labs = [_lab(place, page.parent) for place in lab_folders(folder)]
    text = render(Path(__file__).with_name("page.md.j2"), labs=labs, baseline=BASELINE, largest=LARGEST_ERROR)
    page.write_text(text, encoding="utf-8")
    return page


def _lab(place: Path, here: Path) -> dict[str, Any]:
    """All that the template tells of a lab."""
    rows = read_rows(place)
    check_lab(rows, place / RESULTS)
    check_file(place / "lab.png", "report")
    made = lines(rows)
    draw_lab(rows, place / "lab.png")
    about = next(row for row in rows if row.provider == "lab")
    causes = place / CAUSES
    told = [line for line in made if line.method != BASELINE and "not told" not in line.text]
    return {
        "name": place.name,
        "picture": f"{os.path.relpath(place, here)}/lab.png",
        "case": about.case,
        "about": about.kind.removeprefix("emulated: "),
        "source": f"{about.device}; {about.versions}, commit {about.commit}, {about.date[:10]}",
        "lines": made,
        "baseline": next(line for line in made if line.method == BASELINE),
        "out_of_order": out_of_order(made),
        "causes": causes.read_text("utf-8").strip() if causes.is_file() else "",
        "off": [line for line in told if abs(line.off) > LARGEST_ERROR],
        "farthest": max(told, key=lambda line: abs(line.off), default=None),
        "most": max(line.more for line in made),
        "training": training_table(rows),
        "faults": fault_table(rows),
    }
