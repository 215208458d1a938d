"""torchtitan's own configurations over ranks, by their names: `--module flashcp.integrations.torchtitan --config NAME`.

NAME is a function in the `config_registry` of one of torchtitan's models, such as llama3_8b.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from flashcp.integrations.torchtitan.config import MODELS, with_flashcp
from flashcp.integrations.torchtitan.trainer import Trainer


def __getattr__(name: str) -> Callable[[], Trainer.Config]:
    """The configuration of that name (PEP 562)."""
    for module in _registries():
        if name in _names(module):
            return partial(_make, getattr(module, name))
    raise AttributeError(f"no configuration {name!r} in torchtitan's {', '.join(MODELS)}")


def __dir__() -> list[str]:
    """Of all configurations: torchtitan names them where somebody asks for one that there is not."""
    return [name for module in _registries() for name in _names(module)]


def _registries() -> list[ModuleType]:
    return [import_module(f"torchtitan.models.{model}.config_registry") for model in MODELS]


def _names(module: ModuleType) -> list[str]:
    """Functions that are defined there."""
    functions = inspect.getmembers(module, inspect.isfunction)
    return [name for name, one in functions if one.__module__ == module.__name__ and not name.startswith("_")]


def _make(theirs: Callable[[], Any]) -> Trainer.Config:
    return with_flashcp(theirs())
