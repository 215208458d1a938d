"""A sweep's rows as one table, a line a run: speedups over the baseline, losses against the single-process run."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flashcp.experiments.sweep.results import (
    EMULATED,
    LEFT_OUT,
    MEASURED,
    NO_OVERLAP,
    REFERENCE,
    TURN_MS,
    TURNS,
    Row,
    label,
)

if TYPE_CHECKING:
    import pandas

LOSS_TOLERANCE = 1e-4
"""Relative difference at one step up to which losses agree (fp32)."""
ALIKE = 1.03
"""Ratio of steps up to which nobody is ranked: beside other work turns agreed on less than idle ones confirmed."""
METRICS = ["imbalance", "saving", "attention_ms", "exposed_exchange_ms", "wait_ms", "step_ms", "final_loss"]
Line = Any
"""A line of the table as a named tuple, None where there is no number."""


@dataclass(frozen=True)
class Comparison:
    """The runs of a sweep, case by case, the baseline first and the single-process run last.

    table: one line a run, NaN where there is no number. Times are medians over steps, ms; p20 and p80 are of step_ms.
    factors: what differs between the cases, a column each. kind: of the rows; a line that was left out has no numbers.
    speedup: the baseline's step over this one's: in turns the median of the ratios within a turn, with speedup_p20 and
    speedup_p80, else the ratio of the medians; missing: why there is none; begun: when turns began, which tells whose
    they were. losses: of every step. loss_difference: largest over the steps, relative, against the single-process run.
    exposed_ms: attention_ms + exposed_exchange_ms beyond the attention_ms of overlap `none` on the same case, that is,
    what the exchange adds wherever a level waits for it (`fused` waits inside attention); hidden: the share of that of
    `none` which is gone.
    """

    baseline: str
    table: pandas.DataFrame
    factors: list[str]

    @cached_property
    def lines(self) -> list[Line]:
        whole = self.table.astype(object)
        named = whole.where(self.table.notna(), None).rename(columns=attribute)
        return list(named.itertuples(index=False, name="Line"))

    @property
    def runs(self) -> list[Line]:
        """The lines without those of the single process."""
        return [line for line in self.lines if line.provider != REFERENCE]

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
        return max(compared, key=lambda line: line.loss_difference, default=None)

    @cached_property
    def emulated(self) -> dict[str, str]:
        """The cases over a link that was slowed, and how."""
        hows: dict[str, dict[str, None]] = {}
        for line in self.runs:
            if label(line.kind) == EMULATED:
                hows.setdefault(line.case, {})[line.kind.partition(": ")[2]] = None
        return {case: "; ".join(how) for case, how in hows.items()}

    @property
    def kinds(self) -> list[str]:
        """The kinds of cases there are: numbers of two kinds have no mean."""
        return list(dict.fromkeys(EMULATED if case in self.emulated else MEASURED for case in self.cases))

    def of(self, case: str) -> list[Line]:
        return [line for line in self.lines if line.case == case]

    def title(self, case: str) -> str:
        return f"{case} ({EMULATED})" if case in self.emulated else case

    def mean_speedups(self, kind: str = MEASURED) -> dict[str, float]:
        """Geometric mean over the cases of a kind of every method's speedup, where all of them tell one."""
        cases = [case for case in self.cases if (case in self.emulated) == (kind == EMULATED)]
        found: dict[str, list[float]] = {}
        for line in self.runs:
            if line.case in cases and line.speedup is not None and is_told_apart(line):
                found.setdefault(line.provider, []).append(line.speedup)
        return {name: geometric_mean(each) for name, each in found.items() if len(each) == len(cases)}

    def by_factor(self) -> tuple[list[str], list[list[str]]]:
        """Head and body of a table of speedups, methods down and cases across, named by what differs between them."""
        labels = self.table.drop_duplicates("case").set_index("case")[self.factors].agg(", ".join, axis=1)
        labels = [f"{label} ({EMULATED})" if case in self.emulated else label for case, label in labels.items()]
        found = {(line.provider, line.case): speedup_text(line) for line in self.runs}
        providers = dict.fromkeys(line.provider for line in self.runs)
        body = [[name, *(found.get((name, case), "") for case in self.cases)] for name in providers]
        return [", ".join(self.factors), *labels], body


def compare(rows: Sequence[Row], baseline: str) -> Comparison:
    """The table of these rows. A missing baseline or single-process run leaves the numbers that need it empty."""
    import pandas as pd  # late: it takes half a second, and machines that only measure have none

    frame = pd.DataFrame(rows, columns=list(Row.__dataclass_fields__))
    key = ["case", "provider"]
    table = frame.groupby(key, sort=False)[["kind", "config", "reference"]].first()
    once = frame.drop_duplicates([*key, "metric"])
    medians = once.pivot(index=key, columns="metric", values="median").reindex(columns=[*METRICS, TURNS]).astype(float)
    steps = once[once.metric == "step_ms"].set_index(key)[["p20", "p80"]].astype(float)
    table = table.join(medians[METRICS]).join(steps).join(medians[TURNS].rename("begun"))
    stepwise = frame[frame.step.notna()].sort_values("step", kind="stable")
    stepwise = stepwise.drop_duplicates([*key, "metric", "step"], keep="last")
    for name, metric in (("losses", "loss"), ("turn_ms", TURN_MS)):
        values = stepwise[stepwise.metric == metric].groupby(key, sort=False)["median"].agg(tuple)
        table[name] = [values.get(run, ()) for run in table.index]
    table = table.reset_index()
    single = table.provider == REFERENCE
    runs, alone = table[~single].copy(), table[single].drop_duplicates("config")

    def of(provider: str) -> pandas.DataFrame:
        """That provider's line of each run's case."""
        return runs[["case"]].join(runs[runs.provider == provider].set_index("case"), on="case")

    base, plain = of(baseline), of(NO_OVERLAP)
    # Runs of other settings (steps, model, data) have another single-process run: no speedup over those.
    alike = runs.kind == base.kind  # over one link, and where it was slowed at one rate
    same = (runs.reference == base.reference) & alike
    turns = zip(base.turn_ms, runs.turn_ms, same & (runs.begun == base.begun), strict=True)
    spread = np.array([_in_turns(theirs, own) if together else (np.nan,) * 3 for theirs, own, together in turns])
    p20, within, p80 = spread.reshape(-1, 3).T
    medians = (base.step_ms / runs.step_ms).where(same & (base.step_ms > 0) & (runs.step_ms > 0))
    runs["speedup"], runs["speedup_p20"], runs["speedup_p80"] = np.where(np.isnan(within), medians, within), p20, p80
    why = {LEFT_OUT: runs.kind.map(label) == LEFT_OUT, f"no {baseline}": base.step_ms.isna(), "other link": ~alike}
    runs["missing"] = np.select([*why.values(), ~same], [*why, "other settings"], "")

    expected = runs.reference.map(dict(zip(alone.config, alone.losses, strict=True)))
    runs["loss_difference"] = [_farthest(own, other) for own, other in zip(runs.losses, expected, strict=True)]
    exposed = runs.attention_ms.fillna(0) + runs.exposed_exchange_ms.fillna(0) - plain.attention_ms
    told = (plain.exposed_exchange_ms > 0) & (baseline == NO_OVERLAP)
    runs["exposed_ms"] = exposed.where(told)
    runs["hidden"] = (1 - exposed / plain.exposed_exchange_ms).where(told)

    wanted = runs[["case", "reference"]].drop_duplicates()
    beside = wanted.merge(alone.drop(columns=["case", "reference"]), left_on="reference", right_on="config")
    whole = pd.concat([runs, beside], ignore_index=True) if len(beside) else runs
    order = {case: place for place, case in enumerate(runs.case.unique())}
    turn = (whole.provider != baseline).astype(int) + (whole.provider == REFERENCE)
    whole = whole.iloc[np.lexsort((turn, whole.case.map(order)))].reset_index(drop=True)
    factors = _factors(list(order))
    for name, values_of in factors.items():
        whole[name] = whole.case.map(values_of)
    return Comparison(baseline, whole, list(factors))


def attribute(column: str) -> str:
    """The name under which a line has a column of the table."""
    return re.sub(r"\W", "_", column)


def relative_difference(loss: float, reference: float) -> float:
    """Relative to the reference; where that is 0, to the loss itself."""
    return abs(loss - reference) / (abs(reference) or abs(loss) or 1.0)


def _in_turns(theirs: Sequence[float], own: Sequence[float]) -> tuple[float, float, float]:
    """p20, median, p80 of the ratios within a turn, after warm-up."""
    from flashcp.train.summary import WARM_UP_STEPS

    ratios = [b / a for a, b in zip(own, theirs, strict=False)]
    p20, median, p80 = np.percentile(ratios[WARM_UP_STEPS:] or ratios, (20, 50, 80)).tolist()
    return p20, median, p80


def _farthest(own: tuple[float, ...], expected: object) -> float:
    """Largest relative difference of two runs' losses; NaN where there is nothing to compare."""
    if not own or not isinstance(expected, tuple) or len(own) != len(expected):
        return math.nan
    return max(relative_difference(a, b) for a, b in zip(own, expected, strict=True))


def _factors(cases: Sequence[str]) -> dict[str, dict[str, str]]:
    """What differs between the cases' names, and its value by case: `world_size`, `context`, an override's key."""
    columns: dict[str, dict[str, str]] = {}
    for case in cases:
        head, *overrides = re.split(r"-(?=[\w.]+=)", case)  # values may have dashes
        for place, part in enumerate([*([head] if "=" in head else head.split("-")), *overrides]):
            key, _, value = part.partition("=")
            if size := re.fullmatch(r"([cnb])(\d+k?)", part):
                key, value = {"c": "context", "n": "world_size", "b": "batch_windows"}[size[1]], size[2]
            elif not value:
                key, value = ("link" if part.endswith("gbps") else ("data", "method")[min(place, 1)]), part
            columns.setdefault(key, {})[case] = value
    full = {key: {case: values.get(case, "") for case in cases} for key, values in columns.items()}
    return {key: values for key, values in full.items() if len(set(values.values())) > 1}


def step_parts(line: Line) -> dict[str, float]:
    """A step's median split in attention and exchange (the slowest rank's) and the rest, ms.

    Two ranks may be slowest in turn: what the two say together beyond the step is taken from the exchange. Between
    levels of overlap attention is that of `none`, the exchange what is exposed beside it.
    """
    step, attention, exchange = (x or 0.0 for x in (line.step_ms, line.attention_ms, line.exposed_exchange_ms))
    if line.exposed_ms is not None:
        attention, exchange = attention + exchange - line.exposed_ms, max(0.0, line.exposed_ms)
    attention = min(attention, step)
    exchange = min(exchange, step - attention)
    return {"attention": attention, "exchange": exchange, "rest": step - attention - exchange}


def is_told_apart(line: Line) -> bool:
    """Whether most turns agree on which of the two is faster, and by more than load alone moves a ratio (ALIKE); runs
    that took no turns are not asked."""
    if line.speedup_p20 is None or line.speedup_p20 == line.speedup_p80 == 1:  # the baseline itself
        return True
    return spread_tells(line.speedup_p20, line.speedup_p80)


def spread_tells(p20: float, p80: float) -> bool:
    """Whether most ratios are on one side of 1, and further from it than ALIKE."""
    return bool(p20 > ALIKE or p80 < 1 / ALIKE)


def speedup_text(line: Line) -> str:
    """`1.24 (1.19 - 1.31)`, with the range where turns tell it; `not told apart` where they disagree; or what is
    missing."""
    if line.speedup is None:
        return line.missing or ""
    if line.speedup_p20 is None:
        return f"{line.speedup:.3f}" + (" (other turns)" if line.begun is not None else "")
    if line.speedup_p20 == line.speedup_p80 == 1:  # the baseline itself
        return "1"
    spread = f"({line.speedup_p20:.2f} - {line.speedup_p80:.2f})"
    return f"{line.speedup:.2f} {spread}" if is_told_apart(line) else f"not told apart {spread}"


class Column(NamedTuple):
    """A column of the table as it is told, a line of `columns.csv`.

    of: the comparisons that have it: of methods, of levels of overlap, or both. title: its heading. form: how its
    numbers are written. says: what they are.
    """

    of: str
    name: str
    title: str
    form: str
    says: str

    def cell(self, line: Line) -> str:
        """The number as text; where there is none, nothing, or why there is no speedup."""
        value = getattr(line, attribute(self.name))
        if self.name == "speedup":
            return speedup_text(line)
        if value is None:
            return ""
        plan = line.provider == REFERENCE and self.name in ("imbalance", "saving", "exposed_ms", "hidden", "wait_ms")
        return "" if plan else format(value, self.form)


def columns(comparison: Comparison) -> list[Column]:
    """What is told of each line beside its name. Of methods also what differs between their cases."""
    values = {"baseline": comparison.over, "alike": ALIKE - 1, "tolerance": LOSS_TOLERANCE}
    with Path(__file__).with_name("columns.csv").open(encoding="utf-8", newline="") as lines:
        _, *known = [Column(*(text.format(**values) for text in line)) for line in csv.reader(lines)]
    chosen = [column for column in known if column.of in ("both", "overlap" if comparison.of_overlap else "method")]
    factors = [] if comparison.of_overlap else comparison.factors
    return [*(Column("method", name, name, "", "what differs between the cases") for name in factors), *chosen]
