"""torchtitan's own configurations over ranks, by their names: `--module flashcp.integrations.torchtitan --config NAME`.

NAME is a function in the `config_registry` of one of torchtitan's models, such as llama3_8b.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module

from flashcp.integrations.torchtitan.config import MODELS, with_flashcp
from flashcp.integrations.torchtitan.trainer import Trainer


def __getattr__(name: str) -> Callable[[], Trainer.Config]:
    """The configuration of that name (PEP 562)."""
    for model in MODELS:
        theirs = getattr(import_module(f"torchtitan.models.{model}.config_registry"), name, None)
        if callable(theirs) and not name.startswith("_"):
            return wraps(theirs)(lambda: with_flashcp(theirs()))
    raise AttributeError(f"no configuration {name!r} in torchtitan's {', '.join(MODELS)}")
