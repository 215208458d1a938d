"""What turns tell: ratios of neighbours, a range, and no ranking where turns disagree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from flashcp.experiments.sweep.compare import Line, columns, compare, is_told_apart, speedup_text
from flashcp.experiments.sweep.results import TURN_MS, TURNS, Row
from flashcp.train.summary import WARM_UP_STEPS

Rows = Callable[..., list[Row]]


def in_turns(rows: list[Row], begun: float, times: Sequence[float]) -> list[Row]:
    """The same run, its steps taken in turns that began at `begun`; steps to warm up come before `times`."""
    first = rows[0]
    steps = enumerate([1000.0] * WARM_UP_STEPS + list(times), start=1)
    turns = [replace(first, metric=TURN_MS, unit="ms", step=step, p20=None, median=ms, p80=None) for step, ms in steps]
    return [
        *rows,
        replace(first, metric=TURNS, unit="s since 1970", step=None, p20=None, median=begun, p80=None),
        *turns,
    ]


def line(rows: list[Row], provider: str) -> Line:
    return next(line for line in compare(rows, "llama3").lines if line.provider == provider)


def test_a_load_in_the_middle_meets_both(make_rows: Rows) -> None:
    """One after another the medians are 10 and 12; side by side each step is twice as fast."""
    slow_at = [1, 1, 1, 5, 5, 5, 5]
    base = in_turns(make_rows("llama3", step_ms=10), 7.0, [10 * x for x in slow_at])
    ours = in_turns(make_rows("flashcp", step_ms=12), 7.0, [5 * x for x in slow_at])
    found = line(base + ours, "flashcp")
    assert (found.speedup_p20, found.speedup, found.speedup_p80) == (2, 2, 2)
    assert is_told_apart(found)
    assert speedup_text(found) == "2.00 (2.00 - 2.00)"
    assert speedup_text(line(base + ours, "llama3")) == "1"


def test_turns_that_disagree_rank_nobody(make_rows: Rows) -> None:
    base = in_turns(make_rows("llama3"), 7.0, [10, 10, 10, 10, 10, 10])
    ours = in_turns(make_rows("flashcp"), 7.0, [5, 8, 9, 11, 14, 20])
    found = line(base + ours, "flashcp")
    assert not is_told_apart(found)
    assert speedup_text(found).startswith("not told apart (0.71 - 1.25)")
    speedup = next(column for column in columns(compare(base + ours, "llama3")) if column.title.startswith("speedup"))
    assert speedup.cell(found) == speedup_text(found)


@pytest.mark.parametrize(("ratio", "told"), [(0.96, True), (0.98, False), (1.02, False), (1.04, True)])
def test_turns_that_agree_on_next_to_nothing_rank_nobody(make_rows: Rows, ratio: float, told: bool) -> None:
    base = in_turns(make_rows("llama3"), 7.0, [10 * ratio] * 6)
    ours = in_turns(make_rows("flashcp"), 7.0, [10] * 6)
    found = line(base + ours, "flashcp")
    assert is_told_apart(found) == told
    assert speedup_text(found).startswith("not told apart") != told


def test_steps_of_other_turns_are_no_neighbours(make_rows: Rows) -> None:
    base = in_turns(make_rows("llama3", step_ms=10), 7.0, [10, 10])
    ours = in_turns(make_rows("flashcp", step_ms=5), 8.0, [1, 1])
    found = line(base + ours, "flashcp")
    assert found.speedup == 2
    assert speedup_text(found) == "2.000 (other turns)"
    alone = line(base + make_rows("flashcp", step_ms=5), "flashcp")
    assert speedup_text(alone) == "2.000"


@pytest.mark.parametrize("times", [[9.0], [9.0, 9.5]])
def test_the_baseline_has_no_range(make_rows: Rows, times: list[float]) -> None:
    assert speedup_text(line(in_turns(make_rows("llama3"), 7.0, times), "llama3")) == "1"
