"""What a caller hands over, read where it enters: whole numbers, numbers, choices, flags, lists.

Whatever comes, what is raised is a ValueError of one short line that names the field, the value and what is legal.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable
from itertools import islice
from numbers import Integral, Real
from typing import Any

import numpy as np

MOST_SHOWN = 240  # characters of a value in an error
MOST_ITEMS = 2**24  # of a list: an iterator may have no end


class _Short(reprlib.Repr):
    """Of a value only what is shown: lists may be long, or hold themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 6
        self.maxlist = self.maxtuple = self.maxset = self.maxdict = MOST_SHOWN // 3
        self.maxstring = self.maxlong = self.maxother = 4 * MOST_SHOWN


def shown(value: object) -> str:
    """A value as an error of one line tells it: arrays break theirs, lists of a pack's documents have no end, and an
    object may not be able to say what it is."""
    try:
        text = " ".join(_Short().repr(value).split())
    except Exception:
        text = f"<{type(value).__name__}>"
    return cut(text)


def cut(text: str) -> str:
    """Of words that came with an input, what an error of one line shows."""
    text = " ".join(text.split())
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def first_line(error: BaseException) -> str:
    """What another library says of bad input, which may repeat all of it: its first line, cut."""
    return cut((str(error).splitlines() or [type(error).__name__])[0])


def check_choice(field: str, value: object, legal: Iterable[object]) -> None:
    """Raise ValueError, naming value, field and what is legal, for a choice that there is not."""
    choices = list(legal)
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        raise ValueError(f"{field}={shown(value)}: expected one of {', '.join(map(str, choices))}")


def is_whole(value: object) -> bool:
    """Whether it is a whole number, Python's or numpy's; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def read_whole(field: str, value: object, least: int = 1, most: int | None = None, expected: str = "") -> int:
    """A whole number from `least` to `most`. expected: what is legal, in words. Raises ValueError for anything else."""
    if is_whole(value):
        whole = int(value)  # type: ignore[call-overload]
        if whole >= least and (most is None or whole <= most):
            return whole
    legal = f"a whole number >= {least}" if most is None else f"a whole number >= {least} and <= {most}"
    raise ValueError(f"{field}={shown(value)}: expected {expected or legal}")


def read_number(field: str, value: object, holds: Callable[[float], bool], expected: str) -> float:
    """A number of which `holds` is true, which nan never is. expected: those in words. Raises ValueError for anything
    else."""
    if isinstance(value, Real) and not isinstance(value, bool) and holds(number := as_float(value)):
        return number
    raise ValueError(f"{field}={shown(value)}: expected {expected}")


def as_float(number: Any) -> float:
    """A number as a float: infinity where it is larger than any."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def read_flag(field: str, value: object) -> bool:
    """True or False, Python's or numpy's. Raises ValueError for anything else."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{field}={shown(value)}: expected True or False")
    return bool(value)


def read_list(field: str, values: object, expected: str, most: int = MOST_ITEMS) -> list[object]:
    """The items of what can be iterated over, text and mappings aside. Raises ValueError for anything else, for more
    than `most` items, and where the caller's own code raises on the way."""
    if not isinstance(values, str | bytes | dict):
        try:
            found = list(islice(values, most + 1))  # type: ignore[call-overload]
        except Exception as error:
            raise ValueError(f"{field}={shown(values)}: expected {expected} ({_reason(error)})") from error
        if len(found) <= most:
            return found
        raise ValueError(f"{field}={shown(values)}: expected at most {most} of {expected}")
    raise ValueError(f"{field}={shown(values)}: expected {expected}")


def holds_items(value: object) -> bool:
    """Whether it is a list of some kind; a number of an array or a tensor can be iterated over in name only."""
    return isinstance(value, Iterable) and getattr(value, "ndim", 1) != 0


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
