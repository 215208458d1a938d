"""Labs side by side: what each measured, where the prediction was off, and the page of all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from flashcp.experiments.folders import check_file, render
from flashcp.experiments.lab.picture import draw_lab
from flashcp.experiments.lab.tables import Line, check_lab, fault_table, is_lab, lines, training_table
from flashcp.experiments.sweep.results import RESULTS, read_rows
from flashcp.simulator.summary import BASELINE

PAGE = "LAB_RESULTS.md"
LARGEST_ERROR = 0.2
"""Of a predicted speedup, before the page asks for a cause."""
CAUSES = "causes.md"
"""Beside a lab's rows: why predictions are off there, in words."""


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
