"""Strict reading of mappings: every wrong key or type is named."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest

from flashcp.limits import Count, Limit, NonNegative, Positive, Seconds, one_of
from flashcp.schema import read_dataclass, read_options


@dataclass
class Inner:
    names: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    on: bool = False


@dataclass
class Outer:
    count: int = 1
    rate: float = 0.5
    name: str = "x"
    inner: Inner = field(default_factory=Inner)


def test_fields_left_out_keep_their_defaults() -> None:
    read = read_dataclass(Outer, {"rate": 2, "inner": {"names": ("a", "b"), "options": {"R": 1.1}}})
    assert read == Outer(rate=2.0, inner=Inner(names=["a", "b"], options={"R": 1.1}))
    assert isinstance(read.rate, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cuont": 3}, r"cuont: no such field; expected one of count, rate, name, inner"),
        ({"inner": {"of": True}}, r"inner\.of: no such field; expected one of names, options, on"),
        ({"count": 1.5}, r"count=1\.5: expected a whole number"),
        ({"count": True}, r"count=True: expected a whole number"),
        ({"count": "3"}, r"count='3': expected a whole number"),
        ({"rate": "fast"}, r"rate='fast': expected a number"),
        ({"name": None}, r"name=None: expected text"),
        ({"inner": {"on": 1}}, r"inner\.on=1: expected true or false"),
        ({"inner": {"names": ["a", True]}}, r"inner\.names\[1\]=True: expected text"),
        ({"inner": {"names": "ab"}}, r"inner\.names='ab': expected a list"),
        ({"inner": 7}, r"inner=7: expected a mapping of fields"),
        ([1], r"config=\[1\]: expected a mapping"),
    ],
)
def test_what_does_not_fit_is_named(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_dataclass(Outer, values)


@dataclass
class Limited:
    count: Count = 1
    rate: Positive = 1.0
    share: Annotated[NonNegative, Limit(lambda value: value <= 1, "0 to 1")] = 0.0
    wait_s: Seconds = 1.0
    kind: Annotated[str, one_of(("a", "b"))] = "a"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, r"x\.count=0: expected a whole number >= 1"),
        ({"count": 1.0}, r"x\.count=1\.0: expected a whole number$"),
        ({"rate": 0}, r"x\.rate=0\.0: expected a number > 0"),
        ({"rate": float("nan")}, r"x\.rate=nan: expected a finite number"),
        ({"share": -1}, r"x\.share=-1\.0: expected a number >= 0"),
        ({"share": 2}, r"x\.share=2\.0: expected 0 to 1"),
        ({"wait_s": 1e10}, r"x\.wait_s=10000000000\.0: expected seconds > 0 and <= 1e\+09"),
        ({"kind": "c"}, r"x\.kind='c': expected one of a, b"),
    ],
)
def test_a_value_outside_its_limits_is_named(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_dataclass(Limited, values, "x")
    assert read_dataclass(Limited, {"share": 1, "kind": "b"}, "x") == Limited(share=1.0, kind="b")


def test_a_number_is_text_where_text_is_wanted() -> None:
    """Hydra reads `out=2026` as a number."""
    assert read_dataclass(Outer, {"name": 2026}).name == "2026"


def test_options_have_the_types_of_the_function() -> None:
    def function(first: int, second: int, *, rate: float = 1.0, most: int | None = None, price: Any = None) -> None: ...

    assert read_options(function, {"rate": 2, "most": None}, "f") == {"rate": 2.0, "most": None}
    for values, message in (
        ({"first": 1}, r"f\.first: no such field; expected one of rate, most"),
        ({"most": "x"}, r"f\.most='x': expected a whole number"),
        ({"rate": True}, r"f\.rate=True: expected a number"),
    ):
        with pytest.raises(ValueError, match=message):
            read_options(function, values, "f")
