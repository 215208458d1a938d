"""The simulator against reality: the demo's runs on two CPU ranks, measured beside their prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from flashcp.experiments.paper.numbers import Cell, Numbers, PaperFigure
from flashcp.experiments.plots import INK, PALETTE, ends, spread, styled
from flashcp.experiments.sweep.results import MEASURED, RESULTS, Row, read_rows
from flashcp.sharding.methods import METHODS

__all__ = ["DEMO_HYBRID", "DEMO_PREDICTED", "measured_rows"]

METRICS = ("step_ms", "attention_ms", "exposed_exchange_ms")
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
            if row.kind == MEASURED and row.metric in METRICS and row.provider in METHODS:
                every.setdefault((row.case, row.provider, row.metric), []).append(row)
    merged = []
    for first, *others in every.values():
        p20, median, p80 = np.percentile([first.median, *(row.median for row in others)], (20, 50, 80)).tolist()
        merged.append(replace(first, p20=p20, median=median, p80=p80) if others else first)
    return merged


def _steps(numbers: Numbers) -> dict[str, tuple[Row, float]]:
    """By method: its measured step, and the predicted one. Raises ValueError where the baseline lacks one of them."""
    measured = {row.provider: row for row in numbers.rows if row.kind == MEASURED and row.metric == "step_ms"}
    if BASELINE not in measured:
        raise ValueError(f"no measured step of {BASELINE}: name directories that hold one in measured=[DIR,...]")
    case = next((row.case for row in numbers.rows if row.kind != MEASURED), "")
    found = {}
    for method, row in measured.items():
        pair = "+".join(METHODS[method][1:])  # our implementation, which is what the demo runs
        found[method] = (row, numbers(case, pair if pair in numbers.providers(case) else method, "step_ms"))
    return found


def _told_apart(steps: dict[str, tuple[Row, float]]) -> dict[tuple[str, str], bool]:
    """Pairs of methods whose p20 to p80 do not overlap, and whether they are predicted in the measured order."""
    found = {}
    for (one, (a, predicted_a)), (other, (b, predicted_b)) in combinations(steps.items(), 2):
        low, high = sorted((a, b), key=lambda row: row.median)
        if ends(high)[0] > ends(low)[1]:
            found[one, other] = (a.median < b.median) == (predicted_a < predicted_b)
    return found


def _cells(numbers: Numbers) -> list[Cell]:
    """Speedups over llama3 within a fifth; every pair of methods that measurements tell apart in the same order."""
    steps = _steps(numbers)
    base, predicted_base = steps[BASELINE]
    found = [
        Cell(f"{method}, step, speedup over {BASELINE}", base.median / row.median, predicted_base / ms, allowed=0.20)
        for method, (row, ms) in steps.items()
        if method != BASELINE
    ]
    if pairs := _told_apart(steps):
        found.append(Cell("pairs of methods in the measured order", len(pairs), sum(pairs.values()), allowed=0.0))
    return found


def _facts(numbers: Numbers) -> dict[str, Any]:
    """measured, predicted: one row of each. pairs of methods; wrong: those out of order. outside: methods whose
    predicted step over the baseline's lies outside their measured p20 to p80 over its median."""
    steps = _steps(numbers)
    base, predicted_base = steps[BASELINE]
    expected = {method: ms / predicted_base * base.median for method, (_, ms) in steps.items() if method != BASELINE}
    return {
        "measured": base,
        "predicted": next(row for row in numbers.rows if row.kind != MEASURED),
        "pairs": len(steps) * (len(steps) - 1) // 2,
        "wrong": [" and ".join(pair) for pair, in_order in _told_apart(steps).items() if not in_order],
        "outside": [m for m, ms in expected.items() if not ends(steps[m][0])[0] <= ms <= ends(steps[m][0])[1]],
    }


@styled
def _draw(numbers: Numbers, path: Path) -> None:
    """Measured steps (bars, p20 to p80) and predicted ones (dots), both over llama3's."""
    steps = _steps(numbers)
    base, predicted_base = steps[BASELINE]
    rows, predicted = zip(*steps.values(), strict=True)
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    look: dict[str, Any] = {"color": PALETTE[0], "ecolor": INK, "capsize": 3, "label": "measured"}
    axes.bar(list(steps), [row.median / base.median for row in rows], yerr=spread(rows) / base.median, **look)
    dots = [ms / predicted_base for ms in predicted]
    axes.plot(list(steps), dots, "o", color=PALETTE[2], markersize=9, label="predicted")
    axes.set_ylabel("step time over llama3's (lower: faster)")
    axes.set_title("the demo on two CPU ranks; error bars: p20 to p80 of repeated sweeps")
    axes.tick_params(axis="x", labelrotation=20)
    axes.legend()
    figure.savefig(path)


DEMO_PREDICTED = PaperFigure(
    "the simulator against reality: the demo's two CPU ranks", _draw, _cells, _facts, "measured"
)
DEMO_HYBRID = DEMO_PREDICTED._replace(title="the same, with every rank's kernels run and the exchange modelled")
