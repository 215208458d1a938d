"""The command `flashcp`: its verbs, one module each, how its words become settings, and what it shows."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")
USAGE = Path(__file__).with_name("usage.txt")
AS_JSON: ContextVar[bool] = ContextVar("AS_JSON", default=False)
"""Whether the command line says --json."""


def show(document: Any, text: str, aside: bool = False) -> None:
    """What a verb found, on standard output: text, or one JSON document where that was asked for, and then the text on
    standard error if it is to be seen `aside`."""
    if AS_JSON.get():
        print(json.dumps(document, indent=1, default=vars))
    if text and (aside or not AS_JSON.get()):
        print(text, file=sys.stderr if AS_JSON.get() else sys.stdout)


def bar(items: Iterable[Item], **options: Any) -> Iterable[Item]:
    """The items, one after another, with a bar on standard error where tqdm is installed. options: tqdm's."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return items
    return tqdm(items, **options)


VERBS = {
    "plan": "cli.plan",
    "train": "cli.train",
    "sweep": "sweep.sweep",
    "simulate": "cli.simulate",
    "bench": "cli.bench",
    "report": "sweep.report",
    "doctor": "cli.doctor",
    "export": "cli.export",
}
"""Modules of `experiments/` with `main(words) -> exit code`; `usage.txt` says what they do. One that reads a Hydra
configuration names it in `CONFIG`, or finds it in `keys(words)`: `--help` lists its keys, and then what stands in a
text file beside the module. `WORDS`: what it takes, where that is not overrides alone."""
