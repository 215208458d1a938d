"""The two loops as numba compiles them, or as they stand: the same functions, the same whole numbers, one plan."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from flashcp.sharding.strategies.flashcp import fill, search

__all__ = ["Loops", "loops"]


class Loops(NamedTuple):
    """`fill.fill` and `search.improve`."""

    fill: Callable[..., None]
    improve: Callable[..., tuple[int, int]]


@cache
def loops(compiled: bool) -> Loops:
    """The plain functions, or their compiled twins (numba is imported here, and keeps them on disk)."""
    if not compiled:
        return Loops(fill.fill, search.improve)
    from numba import njit
    from numba.extending import register_jitable

    for helper in (fill.hold, *(getattr(search, name) for name in search.__all__ if name != "improve")):
        register_jitable(helper)
    compile_ = njit(cache=True, error_model="numpy")
    return Loops(compile_(fill.fill), compile_(search.improve))
