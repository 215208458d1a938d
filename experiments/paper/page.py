"""The page of the paper's figures: `page.md.j2`, filled from the rows beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flashcp.experiments.bench.calibration.times import DIRECTIONS, errors, read_times
from flashcp.experiments.paper.figures import FIGURES, publish_figure
from flashcp.experiments.paper.numbers import Numbers, farthest, verdict
from flashcp.experiments.plots import draw_calibration
from flashcp.experiments.sweep.results import RESULTS, WINDOWS, read_rows
from flashcp.experiments.templates import render

__all__ = ["PAGE", "paper_folders", "write_paper_page"]

PAGE = "PAPER_RESULTS.md"


def paper_folders(folder: Path) -> dict[str, Path]:
    """Directories below that hold rows of a figure, by the figure's name."""
    return {name: folder / name for name in FIGURES if (folder / name / RESULTS).is_file()}


def write_paper_page(folder: Path, page: Path) -> Path:
    """Draw every figure again and write the page. Raises ValueError where no figure has rows."""
    places = paper_folders(folder)
    if not places:
        raise ValueError(f"{folder}: no rows of {', '.join(FIGURES)} below it")
    figures = [_figure(name, place, page.parent) for name, place in places.items()]
    calibrations = [_calibration(file, page.parent) for file in sorted((folder / "calibration").glob("*.csv"))]
    page.parent.mkdir(parents=True, exist_ok=True)
    text = render(Path(__file__).with_name("page.md.j2"), figures=figures, calibrations=calibrations)
    page.write_text(text, encoding="utf-8")
    return page


def _figure(name: str, place: Path, here: Path) -> dict[str, Any]:
    """All that the template tells of a figure."""
    figure, rows = FIGURES[name], read_rows(place)
    publish_figure(name, rows, place)
    numbers = Numbers(rows)
    cells = figure.cells(numbers)
    judged = [cell for cell in cells if cell.judged]
    return {
        "name": name,
        "figure": figure,
        "picture": f"{os.path.relpath(place, here)}/{name}.png",
        "cells": cells,
        "judged": judged,
        "held_out": [cell for cell in judged if not cell.fitted],
        "farthest": farthest(judged) if judged else "",
        "verdict": verdict(cells),
        "windows": sorted({int(row.median) for row in rows if row.metric == WINDOWS}),
        "sources": dict.fromkeys(f"{row.kind}, {row.versions}, commit {row.commit}, {row.date[:10]}" for row in rows),
        "facts": figure.facts(numbers),
    }


def _calibration(file: Path, here: Path) -> dict[str, Any]:
    """Predicted attention beside measured one, of schedules that fitted nothing."""
    times, picture = read_times(file), file.with_suffix(".png")
    draw_calibration(times, picture)
    found = {direction: errors(times, direction, "check") for direction in DIRECTIONS}
    return {"name": file.stem, "picture": os.path.relpath(picture, here), "one": times[0], "errors": found}
