"""Loops as numba compiles them: the same numbers as from the functions as they stand."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any


def compiled_twins(
    functions: Iterable[Callable[..., Any]],
    helpers: Iterable[Callable[..., Any]] = (),
    inlined: Iterable[Callable[..., Any]] = (),
    **options: Any,
) -> list[Callable[..., Any]]:
    """The functions, compiled with the helpers that they call, and kept on disk. options: of `numba.njit`.

    inlined: helpers that are part of whatever calls them. A tuple of arrays is handed on array by array, so calls are
    dear: 14 us became 3 for a change of a plan on 64 ranks with a layer mix, 1.5 became 1 without.
    Other threads run meanwhile: a loader's thread plans beside the step.
    Functions and helpers may lie in several files: what is kept is compiled anew when one of them changes.
    Raises ModuleNotFoundError where there is no numba.
    """
    from numba import njit
    from numba.extending import register_jitable

    functions = [register_jitable(function) for function in functions]
    helpers = [register_jitable(helper) for helper in helpers]
    helpers += [register_jitable(forceinline=True)(helper) for helper in inlined]
    modules = {each.__module__: inspect.getmodule(each) for each in (*functions, *helpers)}
    text = "".join(inspect.getsource(modules[name]) for name in sorted(modules))  # type: ignore[arg-type]
    source = hashlib.sha256(text.encode()).hexdigest()
    entries = [_entry(function, source) for function in functions]
    try:
        return [njit(cache=True, nogil=True, **options)(entry) for entry in entries]
    except RuntimeError:  # neither the package's folder nor the user's can be written: compile in every process
        return [njit(nogil=True, **options)(entry) for entry in entries]


def _entry(function: Callable[..., Any], source: str) -> Callable[..., Any]:
    """The function with a digest of all sources in its closure.

    numba keeps what it compiled until the function's file changes, or what its closure holds; of the files of helpers
    it knows nothing.
    """

    def call(*arguments):  # type: ignore[no-untyped-def]
        _ = source
        return function(*arguments)

    return call
