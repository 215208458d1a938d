"""The simulator against reality: the demo's runs on two CPU ranks, measured beside their prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from flashcp.experiments.paper.numbers import Cell, Numbers
from flashcp.experiments.plots import INK, PALETTE, styled
from flashcp.experiments.sweep.results import RESULTS, Row, read_rows
from flashcp.sharding.methods import METHODS

__all__ = ["cells", "draw", "facts", "measured_rows"]

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
        same = apart - len(_out_of_order(steps))
        found.append(Cell("pairs of methods in the measured order", apart, same, allowed=0.0))
    return found


def _out_of_order(steps: dict[str, tuple[Row, float]]) -> list[tuple[str, str]]:
    """Pairs of methods that measurements tell apart and that are predicted the other way round."""
    return [
        (one, other)
        for one, other in combinations(steps, 2)
        if _apart(steps[one][0], steps[other][0])
        and (steps[one][0].median < steps[other][0].median) != (steps[one][1] < steps[other][1])
    ]


def facts(numbers: Numbers) -> dict[str, Any]:
    """measured, predicted: one row of each. pairs of methods; wrong: those out of order. outside: methods whose
    predicted step over the baseline's lies outside their measured p20 to p80 over its median."""
    steps = _steps(numbers)
    base, predicted_base = steps[BASELINE]
    outside = [
        method
        for method, (row, ms) in steps.items()
        if method != BASELINE
        and not (row.p20 or row.median) <= ms / predicted_base * base.median <= (row.p80 or row.median)
    ]
    return {
        "measured": base,
        "predicted": next(row for row in numbers.rows if row.kind != "measured"),
        "pairs": len(steps) * (len(steps) - 1) // 2,
        "wrong": [" and ".join(pair) for pair in _out_of_order(steps)],
        "outside": outside,
    }


def _apart(one: Row, other: Row) -> bool:
    """Whether p20 to p80 of two rows do not overlap."""
    low, high = sorted((one, other), key=lambda row: row.median)
    return (high.p20 or high.median) > (low.p80 or low.median)


@styled
def draw(numbers: Numbers, path: Path) -> None:
    """Measured steps (bars, p20 to p80) and predicted ones (dots), both over llama3's."""
    steps = _steps(numbers)
    base, predicted_base = steps[BASELINE]
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    names, rows = list(steps), [row for row, _ in steps.values()]
    medians = np.array([row.median for row in rows])
    ends = np.array([(row.p20 or row.median, row.p80 or row.median) for row in rows]).T
    errors = np.abs(ends - medians) / base.median
    axes.bar(names, medians / base.median, yerr=errors, color=PALETTE[0], ecolor=INK, capsize=3, label="measured")
    predicted = [ms / predicted_base for _, ms in steps.values()]
    axes.plot(names, predicted, "o", color=PALETTE[2], markersize=9, label="predicted")
    axes.set_ylabel("step time over llama3's (lower: faster)")
    axes.set_title("the demo on two CPU ranks; error bars: p20 to p80 of repeated sweeps")
    axes.tick_params(axis="x", labelrotation=20)
    axes.legend()
    figure.savefig(path)
