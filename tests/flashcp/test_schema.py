"""Strict reading of mappings: every wrong key or type is named."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from flashcp.schema import read_dataclass


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
        ({"inner": {"names": ["a", 2]}}, r"inner\.names\[1\]=2: expected text"),
        ({"inner": {"names": "ab"}}, r"inner\.names='ab': expected a list"),
        ({"inner": 7}, r"inner=7: expected a mapping of fields"),
        ([1], r"config=\[1\]: expected a mapping"),
    ],
)
def test_what_does_not_fit_is_named(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_dataclass(Outer, values)
