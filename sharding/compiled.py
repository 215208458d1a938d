"""Loops as numba compiles them: the same numbers as from the functions as they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def compiled_twins(
    functions: Iterable[Callable[..., Any]], helpers: Iterable[Callable[..., Any]] = (), **options: Any
) -> list[Callable[..., Any]]:
    """The functions, compiled with the helpers that they call, and kept on disk. options: of `numba.njit`.

    Other threads run meanwhile: a loader's thread plans beside the step.
    numba looks for changes in the file of a function, not in those of its helpers: they belong in one file.
    Raises ModuleNotFoundError where there is no numba.
    """
    from numba import njit
    from numba.extending import register_jitable

    for helper in helpers:
        register_jitable(helper)
    try:
        return [njit(cache=True, nogil=True, **options)(function) for function in functions]
    except RuntimeError:  # neither the package's folder nor the user's can be written: compile in every process
        return [njit(nogil=True, **options)(function) for function in functions]
