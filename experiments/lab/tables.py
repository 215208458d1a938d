"""A lab's rows as tables: what was measured beside what was predicted, whole steps, faults on links."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flashcp.experiments.sweep.compare import spread_tells
from flashcp.experiments.sweep.results import Row
from flashcp.simulator.summary import BASELINE
from flashcp.text import table

TAKEN = "taken_cores"
"""Metric of a lab: cores that others used while it measured and that its ranks were to have."""
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
