"""What callers hand over: read, or refused in one short line."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

import flashcp
from flashcp.sharding.lengths import length_stream
from flashcp.sharding.values import (
    MOST_SHOWN,
    check_choice,
    read_flag,
    read_list,
    read_number,
    read_whole,
    shown,
)


def below_two(number: float) -> bool:
    return number < 2


class Mute:
    """Cannot say what it is."""

    def __repr__(self) -> str:
        raise RuntimeError("mute")


def test_what_is_shown_is_short_and_one_line() -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    deep.append(deep)
    for value in (deep, "y" * 10**6, [1] * 10**6, 10**5000, np.eye(3), Mute(), [Mute()], {"a": deep}):
        assert len(shown(value)) <= MOST_SHOWN + 3
        assert "\n" not in shown(value)
    assert shown([1, "a", None]) == "[1, 'a', None]"
    assert shown(10**5000) == "<int>"


def test_numbers_of_python_and_numpy_are_read_as_pythons() -> None:
    assert [type(read_whole("n", value)) for value in (3, np.int64(3), np.uint8(3))] == [int] * 3
    assert read_number("x", Fraction(1, 2), below_two, "a number < 2") == 0.5
    assert read_number("x", -(10**400), below_two, "a number < 2") == -np.inf
    assert read_flag("f", np.bool_(True)) is True
    assert read_list("l", (number for number in (1, 2)), "numbers") == [1, 2]


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: read_whole("n", True), r"^n=True: expected a whole number >= 1$"),
        (lambda: read_whole("n", 0), r"^n=0: expected a whole number >= 1$"),
        (lambda: read_whole("n", 4, most=3), r"^n=4: expected a whole number >= 1 and <= 3$"),
        (lambda: read_whole("n", 1.0, expected="one or more"), r"^n=1\.0: expected one or more$"),
        (lambda: read_number("x", float("nan"), below_two, "a number < 2"), r"^x=nan: expected a number < 2$"),
        (lambda: read_number("x", 10**400, below_two, "a number < 2"), r"^x=1000.*: expected a number < 2$"),
        (lambda: read_number("x", Decimal(1), below_two, "a number < 2"), r"^x=Decimal\('1'\): expected"),
        (lambda: read_number("x", True, below_two, "a number < 2"), r"^x=True: expected"),
        (lambda: read_flag("f", 1), r"^f=1: expected True or False$"),
        (lambda: read_list("l", itertools.repeat(1), "numbers", most=9), r"^l=repeat\(1\): expected at most 9 of nu"),
        (lambda: read_list("l", "ab", "numbers"), r"^l='ab': expected numbers$"),
        (lambda: read_list("l", 3, "numbers"), r"^l=3: expected numbers \(TypeError: 'int' object is not iterable\)$"),
        (lambda: check_choice("c", np.array(["a", "b"]), ["a", "b"]), r"^c=array.*: expected one of a, b$"),
        (lambda: check_choice("c", 1, [1.5, "a"]), r"^c=1: expected one of 1\.5, a$"),
        (lambda: flashcp.plan([4, 3], 2, cost=5), r"^cost=5: expected a function, as flashcp.predicted_time gives, or"),
        (lambda: flashcp.plan([4, 3], 2**20 + 1), r"^world_size=1048577: expected a whole number >= 1 and <= 1048576$"),
        (lambda: flashcp.plan([4, 3], 2, budget=10**10), r"^budget=10000000000: expected a whole number >= 0 and"),
        (lambda: flashcp.plan(itertools.repeat(1), 2), r"^document_lengths=repeat\(1\): expected at most 16777216 of"),
        (lambda: length_stream("pile", 0, sigma=1e308), r"^sigma=1e\+308: expected a number > 0 and <= 8$"),
        (lambda: length_stream("pile", [0]), r"^seed=\[0\]: expected a whole number >= 0$"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_what_is_none_is_refused(read: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read()
