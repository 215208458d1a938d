"""torchtitan's own configurations over ranks, by their names: `--module flashcp.integrations.torchtitan --config NAME`.

NAME is a function in the `config_registry` of one of torchtitan's models, such as llama3_8b.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from flashcp.integrations.torchtitan.config import MODELS, with_flashcp
from flashcp.integrations.torchtitan.trainer import Trainer


def __getattr__(name: str) -> Callable[[], Trainer.Config]:
    """The configuration of that name (PEP 562)."""
    for model in MODELS:
        theirs = getattr(import_module(f"torchtitan.models.{model}.config_registry"), name, None)
        if callable(theirs) and not name.startswith("_"):
            return partial(_make, theirs)
    raise AttributeError(f"no configuration {name!r} in torchtitan's {', '.join(MODELS)}")


def _make(theirs: Callable[[], Any]) -> Trainer.Config:
    return with_flashcp(theirs())
