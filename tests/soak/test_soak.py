"""What the soak calls growing, and some of its steps."""

from __future__ import annotations

import random

import pytest

import flashcp
from tests.ranks import run_ranks
from tests.soak.__main__ import BOUND, COMPARED, Choice, Sample, run_step, what_grew


def samples(late: float) -> list[Sample]:
    """Of two ranks: the first quarter fills, the second half of rank 1 has so many times the threads."""
    made = []
    for step in range(1, 101):
        for rank in (0, 1):
            threads = 10 if step > 25 else step % 10
            made.append(Sample(step, rank, 300.0 + step % 7, 40, int(threads * (late if rank and step > 50 else 1)), 1))
    return made


@pytest.mark.parametrize(("late", "found"), [(1.0, []), (1.2, []), (1.5, ["rank 1: threads grew from 10 to 15"])])
def test_only_what_goes_on_growing_is_told(late: float, found: list[str]) -> None:
    assert what_grew(samples(late)) == found


def worst_of(steps: int) -> float:
    operators: dict[Choice, flashcp.ContextParallel] = {}
    errors = [run_step(COMPARED * step, random.Random(step), operators) for step in range(1, steps + 1)]
    for cp in operators.values():
        cp.close()
    return max(errors)


def test_some_steps_are_right_and_the_same_to_the_bit() -> None:
    assert all(0 < error < BOUND for error in run_ranks(worst_of, 4, 12))
