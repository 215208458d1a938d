"""A sweep's rows as one line a method, or a line a level of overlap: speedups over the baseline, losses against the
single-process run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from flashcp.experiments.sweep.rows import REFERENCE, TURN_MS, TURNS, Row
from flashcp.train.summary import WARM_UP_STEPS

__all__ = ["LOSS_TOLERANCE", "NO_OVERLAP", "Comparison", "Line", "compare", "relative_difference"]

LOSS_TOLERANCE = 1e-4
"""Relative difference at one step up to which losses agree (fp32)."""
NO_OVERLAP = "none"
"""The baseline of a sweep whose lines are levels of overlap."""


@dataclass(frozen=True)
class Line:
    """One method, or level of overlap, on one case. None: there is no such number. Times are medians over steps, ms.

    speedup: the baseline's step over this one's: in turns the median of the ratios within a turn, with their p20 and
    p80, else the ratio of the medians. loss_difference: largest over the steps, relative, against the
    single-process run. losses: of every step. exposed_ms: attention_ms + exposed_exchange_ms beyond the attention_ms
    of overlap `none` on the same case, that is, what the exchange adds wherever a level waits for it (`fused` waits
    inside attention); hidden: the share of that of `none` which is gone.
    """

    case: str
    provider: str
    imbalance: float | None
    saving: float | None
    attention_ms: float | None
    exposed_exchange_ms: float | None
    wait_ms: float | None
    step_ms: float | None
    speedup: float | None
    final_loss: float | None
    loss_difference: float | None
    losses: tuple[float, ...]
    kind: str
    exposed_ms: float | None = None
    hidden: float | None = None
    speedup_p20: float | None = None
    speedup_p80: float | None = None
    took_turns: bool = False

    @property
    def is_told_apart(self) -> bool:
        """Whether most turns agree on which of the two is faster; runs that took no turns are not asked."""
        low, high = self.speedup_p20, self.speedup_p80
        return low is None or high is None or not low < 1 < high

    @property
    def speedup_text(self) -> str:
        """`1.24 (1.19 - 1.31)`, with the range where turns tell it; `not told apart` where they disagree."""
        if self.speedup is None:
            return ""
        if self.speedup_p20 is None:
            return f"{self.speedup:.3f}" + (" (other turns)" if self.took_turns else "")
        if self.speedup_p20 == self.speedup_p80 == 1:  # the baseline itself
            return "1"
        spread = f"({self.speedup_p20:.2f} - {self.speedup_p80:.2f})"
        return f"{self.speedup:.2f} {spread}" if self.is_told_apart else f"not told apart {spread}"

    @property
    def is_hidden_told(self) -> bool:
        """Whether `hidden` is a share, give or take a tenth: attention varies between runs."""
        return self.hidden is not None and -0.1 <= self.hidden <= 1.1

    @property
    def is_single(self) -> bool:
        """Whether it is the single-process run."""
        return self.provider == REFERENCE


@dataclass(frozen=True)
class Comparison:
    """The lines of a sweep, case by case, the baseline first and the single-process run last."""

    baseline: str
    lines: tuple[Line, ...]

    @property
    def of_overlap(self) -> bool:
        """Whether levels of overlap are compared, of one method and one implementation of attention a case."""
        return self.baseline == NO_OVERLAP

    @property
    def over(self) -> str:
        """The baseline as headings name it."""
        return f"overlap {self.baseline}" if self.of_overlap else self.baseline

    @property
    def cases(self) -> list[str]:
        """Every case, in the order of the rows."""
        return list(dict.fromkeys(line.case for line in self.lines))

    @property
    def worst_difference(self) -> Line | None:
        """The line whose losses are furthest from the single-process run's."""
        compared = [line for line in self.lines if line.loss_difference is not None]
        return max(compared, key=lambda line: line.loss_difference or 0.0, default=None)

    def mean_speedups(self) -> dict[str, float]:
        """Geometric mean over cases of every method's speedup, where all cases have one."""
        cases = len(self.cases)
        found: dict[str, list[float]] = {}
        for line in self.lines:
            if line.speedup:
                found.setdefault(line.provider, []).append(line.speedup)
        return {
            provider: math.exp(sum(map(math.log, values)) / len(values))
            for provider, values in found.items()
            if len(values) == cases
        }


def compare(rows: Sequence[Row], baseline: str) -> Comparison:
    """Lines from rows. A missing baseline or single-process run leaves the numbers that need it empty."""
    runs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        runs.setdefault((row.case, row.provider), []).append(row)
    by_config = {found[0].config: found for found in runs.values()}
    lines: list[Line] = []
    cases: dict[str, list[list[Row]]] = {}
    for (case, provider), found in runs.items():
        if provider != REFERENCE:
            cases.setdefault(case, []).append(found)
    for found_runs in cases.values():
        found_runs.sort(key=lambda found: found[0].provider != baseline)
        first = next((found for found in found_runs if found[0].provider == baseline), None)
        for found in found_runs:
            # Runs of other settings (steps, model, data) have another single-process run: no speedup over those.
            same = first is not None and found[0].reference == first[0].reference
            lines.append(_line(found, first if same else None, by_config))
        references = dict.fromkeys(found[0].reference for found in found_runs)
        alone = [by_config[digest] for digest in references if digest in by_config]
        lines += [dataclasses.replace(_line(found, None, {}), case=found_runs[0][0].case) for found in alone]
    comparison = Comparison(baseline, tuple(lines))
    return Comparison(baseline, tuple(_exposed(lines))) if comparison.of_overlap else comparison


def relative_difference(loss: float, reference: float) -> float:
    """Relative to the reference; where that is 0, to the loss itself."""
    return abs(loss - reference) / (abs(reference) or abs(loss) or 1.0)


def _line(rows: Sequence[Row], baseline: Sequence[Row] | None, runs: dict[str, list[Row]]) -> Line:
    first, own = rows[0], _losses(rows)
    p20, speedup, p80 = _speedup(rows, baseline or ())
    expected = _losses(runs.get(first.reference, []))
    difference = None
    if own and len(own) == len(expected):
        difference = max(relative_difference(a, b) for a, b in zip(own, expected, strict=True))
    return Line(
        case=first.case,
        provider=first.provider,
        imbalance=_number(rows, "imbalance"),
        saving=_number(rows, "saving"),
        attention_ms=_number(rows, "attention_ms"),
        exposed_exchange_ms=_number(rows, "exposed_exchange_ms"),
        wait_ms=_number(rows, "wait_ms"),
        step_ms=_number(rows, "step_ms"),
        speedup=speedup,
        speedup_p20=p20,
        speedup_p80=p80,
        final_loss=_number(rows, "final_loss"),
        loss_difference=difference,
        losses=own,
        kind=first.kind,
        took_turns=_number(rows, TURNS) is not None,
    )


def _exposed(lines: Sequence[Line]) -> Iterator[Line]:
    """The lines with what the exchange adds, where overlap `none` was measured on the same case."""
    plain = {line.case: line for line in lines if line.provider == NO_OVERLAP}
    for line in lines:
        first = plain.get(line.case)
        if line.is_single or first is None or first.attention_ms is None or not first.exposed_exchange_ms:
            yield line
        else:
            exposed = (line.attention_ms or 0.0) + (line.exposed_exchange_ms or 0.0) - first.attention_ms
            yield dataclasses.replace(line, exposed_ms=exposed, hidden=1 - exposed / first.exposed_exchange_ms)


def _number(rows: Sequence[Row], metric: str) -> float | None:
    return next((row.median for row in rows if row.metric == metric), None)


def _speedup(rows: Sequence[Row], baseline: Sequence[Row]) -> tuple[float | None, float | None, float | None]:
    """p20, median, p80 of the ratios within a turn; of runs that took no turns together the ratio of medians."""
    begun = _number(rows, TURNS)
    if begun is not None and begun == _number(baseline, TURNS):
        ours, theirs = _by_step(rows, TURN_MS), _by_step(baseline, TURN_MS)
        ratios = [b / a for a, b in zip(ours, theirs, strict=False)]
        p20, median, p80 = np.percentile(ratios[WARM_UP_STEPS:] or ratios, [20, 50, 80]).tolist()
        return p20, median, p80
    step_ms, baseline_ms = _number(rows, "step_ms"), _number(baseline, "step_ms")
    return None, baseline_ms / step_ms if baseline_ms and step_ms else None, None


def _losses(rows: Sequence[Row]) -> tuple[float, ...]:
    return _by_step(rows, "loss")


def _by_step(rows: Sequence[Row], metric: str) -> tuple[float, ...]:
    steps = {row.step: row.median for row in rows if row.metric == metric and row.step is not None}
    return tuple(steps[step] for step in sorted(steps))
