"""What torch.compile leaves alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def untraced(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, before which torch.compile ends its graph: it is run as it stands.

    As `torch.compiler.disable`, but that imports the compiler, which takes every rank 1.5 s. As long as nobody else has
    imported it, it traces nothing.
    """
    disabled: Any = torch._disable_dynamo(function)

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return disabled(*args, **kwargs) if "torch._dynamo" in sys.modules else function(*args, **kwargs)

    return call
