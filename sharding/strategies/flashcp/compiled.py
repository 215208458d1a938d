"""The two loops as numba compiles them, or as they stand: the same functions, the same whole numbers, one plan."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from flashcp.sharding.strategies.flashcp import changes, fill, search, state

__all__ = ["Loops", "loops"]


class Loops(NamedTuple):
    """`fill.fill` and `search.improve`."""

    fill: Callable[..., None]
    improve: Callable[..., tuple[int, int]]


@cache
def loops(compiled: bool) -> Loops:
    """The plain functions, or their compiled twins; numba is imported here, and keeps what it compiled on disk.

    The plain ones, with a warning, where it is not installed: the same plan, after seconds for a big window.
    """
    plain = Loops(fill.fill, search.improve)
    if not compiled:
        return plain
    try:
        from numba import njit
        from numba.extending import register_jitable
    except ModuleNotFoundError:
        warnings.warn("numba is not installed: big windows are planned uncompiled, slowly", stacklevel=2)
        return plain

    functions = (
        *(fill.hold, fill.fill),
        *(state.find, state.layout, state.charge),
        *(changes.note, changes.adopt, changes.propose_split, changes.propose_moved),
        *(search.draw, search.overwork, search.volume_energy, search.improve),
    )
    for function in functions:
        register_jitable(function)
    stamp = zlib.crc32(repr([_code(function) for function in functions]).encode())

    # numba looks for changes in the file of the function it compiles only; the stamp stands for the others.
    def stamped_fill(*arguments):  # type: ignore[no-untyped-def]
        if stamp >= 0:
            fill.fill(*arguments)

    def stamped_improve(*arguments):  # type: ignore[no-untyped-def]
        if stamp >= 0:
            return search.improve(*arguments)

    try:
        compile_ = njit(cache=True, error_model="numpy")
        return Loops(compile_(stamped_fill), compile_(stamped_improve))
    except RuntimeError:  # neither the package's folder nor the user's can be written: compile in every process
        compile_ = njit(error_model="numpy")
        return Loops(compile_(stamped_fill), compile_(stamped_improve))


def _code(function: Callable[..., Any]) -> tuple[object, ...]:
    code = function.__code__
    return code.co_code, code.co_consts, code.co_names
