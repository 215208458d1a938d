"""A sweep's rows as one line a method, or a line a level of overlap: speedups over the baseline, losses against the
single-process run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flashcp.experiments.sweep.rows import REFERENCE, Row

__all__ = ["LOSS_TOLERANCE", "NO_OVERLAP", "Comparison", "Line", "compare", "relative_difference"]

LOSS_TOLERANCE = 1e-4
"""Relative difference at one step up to which losses agree (fp32)."""
NO_OVERLAP = "none"
"""The baseline of a sweep whose lines are levels of overlap."""


@dataclass(frozen=True)
class Line:
    """One method, or level of overlap, on one case. None: there is no such number. Times are medians over steps, ms.

    speedup: the baseline's step over this one's. loss_difference: largest over the steps, relative, against the
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
            lines.append(_line(found, _number(first, "step_ms") if first and same else None, by_config))
        references = dict.fromkeys(found[0].reference for found in found_runs)
        alone = [by_config[digest] for digest in references if digest in by_config]
        lines += [dataclasses.replace(_line(found, None, {}), case=found_runs[0][0].case) for found in alone]
    comparison = Comparison(baseline, tuple(lines))
    return Comparison(baseline, tuple(_exposed(lines))) if comparison.of_overlap else comparison


def relative_difference(loss: float, reference: float) -> float:
    """Relative to the reference; where that is 0, to the loss itself."""
    return abs(loss - reference) / (abs(reference) or abs(loss) or 1.0)


def _line(rows: Sequence[Row], baseline_ms: float | None, runs: dict[str, list[Row]]) -> Line:
    first, step_ms, own = rows[0], _number(rows, "step_ms"), _losses(rows)
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
        step_ms=step_ms,
        speedup=baseline_ms / step_ms if baseline_ms and step_ms else None,
        final_loss=_number(rows, "final_loss"),
        loss_difference=difference,
        losses=own,
        kind=first.kind,
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


def _losses(rows: Sequence[Row]) -> tuple[float, ...]:
    steps = {row.step: row.median for row in rows if row.metric == "loss" and row.step is not None}
    return tuple(steps[step] for step in sorted(steps))
