"""The simulator against reality: the demo's runs on two CPU ranks, measured beside their prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from flashcp.experiments.paper.bars import COLOURS, tidy
from flashcp.experiments.paper.cells import Cell, Numbers
from flashcp.experiments.sweep.figure import INK
from flashcp.experiments.sweep.rows import RESULTS, Row, read_rows
from flashcp.sharding.methods import METHODS

__all__ = ["beyond_noise", "cells", "draw", "measured_rows", "out_of_order"]

METRICS = ("step_ms", "attention_ms", "exposed_exchange_ms")
ALLOWED = 0.20
BASELINE = "llama3"


def measured_rows(folders: Sequence[str]) -> list[Row]:
    """Times of several sweeps of the same runs, one row each: median, p20 and p80 over the sweeps' medians.

    Of one sweep its own row. Raises ValueError for a directory without rows.
    """
    every: dict[tuple[str, str, str], list[Row]] = {}
    for folder in folders:
        rows = read_rows(Path(folder))
        if not rows:
            raise ValueError(f"measured={folder!r}: no {RESULTS} in it; expected the directory of a sweep")
        for row in rows:
            if row.kind == "measured" and row.metric in METRICS and row.provider in METHODS:
                every.setdefault((row.case, row.provider, row.metric), []).append(row)
    return [_over_sweeps(rows) for rows in every.values()]


def _over_sweeps(rows: Sequence[Row]) -> Row:
    if len(rows) == 1:
        return rows[0]
    p20, median, p80 = np.percentile([row.median for row in rows], (20, 50, 80)).tolist()
    return replace(rows[0], p20=p20, median=median, p80=p80)


def _steps(numbers: Numbers) -> dict[str, tuple[Row, float]]:
    """By method: its measured step, and the predicted one. Raises ValueError where the baseline lacks one of them."""
    measured = {row.provider: row for row in numbers.rows if row.kind == "measured" and row.metric == "step_ms"}
    if BASELINE not in measured:
        raise ValueError(f"no measured step of {BASELINE}: name directories that hold one in measured=[DIR,...]")
    case = next((row.case for row in numbers.rows if row.kind != "measured"), "")
    found = {}
    for method, row in measured.items():
        pair = "+".join(METHODS[method][1:])  # our implementation, which is what the demo runs
        provider = pair if pair in numbers.providers(case) else method
        found[method] = (row, numbers(case, provider, "step_ms"))
    return found


def cells(numbers: Numbers) -> list[Cell]:
    """Speedups over llama3 within a fifth; every pair of methods that measurements tell apart in the same order."""
    steps = _steps(numbers)
    base, predicted_base = steps[BASELINE]
    found = [
        Cell(f"{method}, step, speedup over {BASELINE}", base.median / row.median, predicted_base / ms, allowed=ALLOWED)
        for method, (row, ms) in steps.items()
        if method != BASELINE
    ]
    if apart := sum(_apart(a[0], b[0]) for a, b in combinations(steps.values(), 2)):
        same = apart - len(out_of_order(numbers))
        found.append(Cell("pairs of methods in the measured order", apart, same, allowed=0.0))
    return found


def out_of_order(numbers: Numbers) -> list[tuple[str, str]]:
    """Pairs of methods that measurements tell apart and that are predicted the other way round."""
    steps = _steps(numbers)
    return [
        (one, other)
        for one, other in combinations(steps, 2)
        if _apart(steps[one][0], steps[other][0])
        and (steps[one][0].median < steps[other][0].median) != (steps[one][1] < steps[other][1])
    ]


def beyond_noise(numbers: Numbers) -> list[str]:
    """Methods whose predicted step over the baseline's lies outside their measured p20 to p80 over its median."""
    steps = _steps(numbers)
    base, predicted_base = steps[BASELINE]
    return [
        method
        for method, (row, ms) in steps.items()
        if method != BASELINE
        and not (row.p20 or row.median) <= ms / predicted_base * base.median <= (row.p80 or row.median)
    ]


def _apart(one: Row, other: Row) -> bool:
    """Whether p20 to p80 of two rows do not overlap."""
    low, high = sorted((one, other), key=lambda row: row.median)
    return (high.p20 or high.median) > (low.p80 or low.median)


def draw(numbers: Numbers, path: Path) -> None:
    """Measured steps (bars, p20 to p80) and predicted ones (dots), both over llama3's."""
    steps = _steps(numbers)
    base, predicted_base = steps[BASELINE]
    figure = Figure(figsize=(8, 4), layout="constrained", facecolor="white")
    axes = figure.subplots()
    names = list(steps)
    medians = np.array([steps[name][0].median for name in names])
    low = medians - [steps[name][0].p20 or steps[name][0].median for name in names]
    high = [steps[name][0].p80 or steps[name][0].median for name in names] - medians
    errors = np.stack((low, high)) / base.median
    axes.bar(names, medians / base.median, yerr=errors, color=COLOURS[0], ecolor=INK, capsize=3, label="measured")
    predicted = [steps[name][1] / predicted_base for name in names]
    axes.plot(names, predicted, "o", color=COLOURS[2], markersize=9, label="predicted")
    axes.set_ylabel("step time over llama3's (lower: faster)")
    axes.set_title("the demo on two CPU ranks; error bars: p20 to p80 of repeated sweeps", loc="left")
    axes.tick_params(axis="x", labelrotation=20)
    axes.legend(frameon=False, fontsize=9)
    tidy(axes)
    figure.savefig(path, dpi=160)
