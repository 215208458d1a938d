"""Python objects by number, for torch operators, which take tensors and numbers alone.

An object's number lies in an int64 array of one element, which torch reads as a tensor without copying it. To
torch.compile the number is data: compiled once, the same code serves every object.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

_next = itertools.count(1)
_known: WeakValueDictionary[int, Any] = WeakValueDictionary()


class Keeping(np.ndarray):
    """A number that keeps its object alive as long as its own memory is in use, by whatever tensor."""

    thing: object


def number_of(thing: object) -> np.ndarray:
    """A new number of an object, int64 [1]. The object lives no longer for it."""
    array = np.array([next(_next)], dtype=np.int64)
    _known[int(array[0])] = thing
    return array


def keeping_number_of(thing: object) -> Keeping:
    """The same, of an object that lives as long as the number does."""
    array = number_of(thing).view(Keeping)
    array.thing = thing
    return array


def known() -> dict[int, Any]:
    """All objects that are there."""
    return dict(_known)


def numbered(which: int) -> Any:
    """The object of a number. Raises LookupError when it is gone."""
    thing = _known.get(which)
    if thing is None:
        raise LookupError(f"the object of number {which} is gone")
    return thing
