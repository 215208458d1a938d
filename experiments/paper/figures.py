"""Every figure of the paper that is drawn again: what of it ours stands beside, the picture, and the page of all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashcp.experiments.bench.calibration import DIRECTIONS, errors, read_times
from flashcp.experiments.folders import render
from flashcp.experiments.paper import beyond, published, workloads
from flashcp.experiments.paper.numbers import Numbers, farthest, verdict
from flashcp.experiments.plots import draw_calibration
from flashcp.experiments.sweep.results import RESULTS, WINDOWS, Row, read_rows

PAGE = "PAPER_RESULTS.md"
FIGURES = published.FIGURES | beyond.FIGURES | workloads.FIGURES


def publish_figure(name: str, rows: Sequence[Row], out: Path) -> str:
    """Draw the figure into the directory of its rows; every number beside the paper's, and how far they are apart.

    Raises ValueError where rows that it needs are missing.
    """
    figure, numbers = FIGURES[name], Numbers(rows)
    try:
        cells = figure.cells(numbers)
        figure.draw(numbers, out / f"{name}.png")
    except (ArithmeticError, LookupError, StopIteration) as error:  # of rows that are not all there
        raise ValueError(f"{name} cannot be made of these rows ({type(error).__name__}: {error})") from error
    return "\n".join([f"{name}: {figure.title}", *map(str, cells), verdict(cells)])


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
    cells = figure.cells(Numbers(rows))
    judged = [cell for cell in cells if cell.judged]
    return {
        "name": name,
        "figure": figure,
        "picture": f"{os.path.relpath(place, here)}/{name}.png",
        "cells": cells,
        "farthest": farthest(judged) if judged else "",
        "verdict": verdict(cells),
        "windows": sorted({int(row.median) for row in rows if row.metric == WINDOWS}),
        "sources": dict.fromkeys(f"{row.kind}, {row.versions}, commit {row.commit}, {row.date[:10]}" for row in rows),
        "facts": figure.facts(Numbers(rows)),
    }


def _calibration(file: Path, here: Path) -> dict[str, Any]:
    """Predicted attention beside measured one, of schedules that fitted nothing."""
    times, picture = read_times(file), file.with_suffix(".png")
    draw_calibration(times, picture)
    found = {direction: errors(times, direction, "check") for direction in DIRECTIONS}
    return {"name": file.stem, "picture": os.path.relpath(picture, here), "one": times[0], "errors": found}
