"""What no caller means to hand over: wrong types, ends of ranges, objects that raise. Made anew for each call."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

HOSTILE = "hostile"
"""What objects of ours raise."""


class Whole(int):
    """A whole number by another name."""


def _raises(*_: object, **__: object) -> NoReturn:
    raise RuntimeError(HOSTILE)


def raising(*methods: str) -> Any:
    """An object of which these methods raise."""
    return type("Hostile", (), dict.fromkeys(methods, _raises))()


def deep(levels: int) -> list[Any]:
    """A list in a list in a list ..."""
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


def in_itself() -> list[Any]:
    found: list[Any] = [1]
    found.append(found)
    return found


VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "-1": lambda: -1,
    "0": lambda: 0,
    "2**31": lambda: 2**31,
    "2**63": lambda: 2**63,
    "2**64": lambda: 2**64,
    "-2**63 - 1": lambda: -(2**63) - 1,
    "10**400": lambda: 10**400,
    "10**5000": lambda: 10**5000,  # has no repr: Python makes text of 4300 digits and no more
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "-inf": lambda: -math.inf,
    "1e308": lambda: 1e308,
    "1.5": lambda: 1.5,
    "empty text": lambda: "",
    "x": lambda: "x",
    "null": lambda: "\0",
    "lines": lambda: "a\nb\r\n\x85c",
    "long text": lambda: "y" * 10_000,
    "surrogate": lambda: "\ud800",
    "bytes": lambda: b"",
    "more bytes": lambda: b"\xff\x00",
    "[]": list,
    "[[]]": lambda: [[]],
    "[None]": lambda: [None],
    "[1, 'a']": lambda: [1, "a"],
    "[-1]": lambda: [-1],
    "[2**40]": lambda: [2**40],
    "[2**64]": lambda: [2**64],
    "[1, [2]]": lambda: [1, [2]],
    "many": lambda: [1] * 10_000,
    "deep": lambda: deep(3000),
    "in itself": in_itself,
    "()": lambda: (),
    "{}": dict,
    "{1: 2}": lambda: {1: 2},
    "{'name': 1}": lambda: {"name": 1},
    "set()": set,
    "{1, 2}": lambda: {1, 2},
    "object": object,
    "lambda": lambda: lambda: None,
    "class": lambda: dict,
    "generator": lambda: (number for number in (1, 2)),
    "without end": lambda: itertools.repeat(1),
    "complex": lambda: 1j,
    "Decimal": lambda: Decimal("NaN"),
    "Fraction": lambda: Fraction(1, 3),
    "datetime": lambda: datetime(2026, 1, 1, tzinfo=UTC),
    "Path": lambda: Path("x"),
    "int subclass": lambda: Whole(-5),
    "np.int64": lambda: np.int64(-3),
    "np.uint64": lambda: np.uint64(2**64 - 1),
    "np.float64": lambda: np.float64("nan"),
    "np.bool_": lambda: np.bool_(True),
    "array of floats": lambda: np.array([1.5, math.nan]),
    "array [2, 2]": lambda: np.ones((2, 2), dtype=np.int64),
    "array of negatives": lambda: np.array([-1, 4]),
    "array of huge": lambda: np.array([2**62, 2**62, 2**62]),
    "array of uint64": lambda: np.array([2**64 - 1], dtype=np.uint64),
    "array of bools": lambda: np.array([True, False]),
    "array of objects": lambda: np.array([object(), None], dtype=object),
    "array of text": lambda: np.array(["a", "b"]),
    "empty array": lambda: np.array([], dtype=np.int64),
    "array []": lambda: np.array(3),
    "tensor": lambda: torch.tensor([4, 3]),
    "tensor of floats": lambda: torch.ones(2, 3),
    "tensor of complex": lambda: torch.ones(7, 2, 4, dtype=torch.complex64),
    "tensor on meta": lambda: torch.ones(7, 2, 4, device="meta"),
    "tensor of int on meta": lambda: torch.ones(7, device="meta", dtype=torch.int64),
    "tensor with gradient": lambda: torch.ones(7, 2, 4, requires_grad=True),
    "tensor with strides": lambda: torch.ones(4, 2, 7).permute(2, 1, 0),
    "tensor of 8 bits": lambda: torch.ones(7, 2, 4).to(torch.float8_e4m3fn),
    "tensor of nan": lambda: torch.full((7, 2, 4), math.nan),
    "sparse tensor": lambda: torch.eye(7).to_sparse(),
    "empty tensor": lambda: torch.empty(0, 2, 4),
    "tensor []": lambda: torch.tensor(3),
    "raises as __len__": lambda: raising("__len__", "__getitem__"),
    "raises as __array__": lambda: raising("__array__"),
    "raises as __iter__": lambda: raising("__iter__"),
    "raises as __eq__": lambda: raising("__eq__", "__hash__", "__bool__"),
    "raises as __repr__": lambda: raising("__repr__", "__str__"),
    "raises as a number": lambda: raising("__index__", "__int__", "__float__", "__lt__", "__le__", "__gt__", "__ge__"),
}
