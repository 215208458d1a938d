"""Ranges of configuration values, as annotations of fields: `steps: Count = 100`. `flashcp/schema.py` checks them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Limit:
    """What a value of the right type must be besides. wanted: in words, after "expected"."""

    holds: Callable[[Any], bool]
    wanted: str


def one_of(names: Collection[str]) -> Limit:
    """A name among others."""
    return Limit(lambda value: value in names, f"one of {', '.join(names)}")


FINITE = Limit(math.isfinite, "a finite number")
LONGEST_WAIT_S = 1e9  # 30 years: clocks that count nanoseconds in 64 bits still hold it

Count = Annotated[int, Limit(lambda value: value >= 1, "a whole number >= 1")]
Natural = Annotated[int, Limit(lambda value: value >= 0, "a whole number >= 0")]
Rows = Annotated[int, Limit(lambda value: 0 <= value < 2**31, "a whole number >= 0 and < 2**31")]
Seed = Annotated[int, Limit(lambda value: 0 <= value < 2**63, "a whole number >= 0 and < 2**63")]
Positive = Annotated[float, FINITE, Limit(lambda value: value > 0, "a number > 0")]
NonNegative = Annotated[float, FINITE, Limit(lambda value: value >= 0, "a number >= 0")]
Seconds = Annotated[float, Limit(lambda value: 0 < value <= LONGEST_WAIT_S, f"seconds > 0 and <= {LONGEST_WAIT_S:.0e}")]
