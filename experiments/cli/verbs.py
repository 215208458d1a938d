"""The verbs of the command line, one line each."""

from __future__ import annotations

from contextvars import ContextVar
from typing import NamedTuple

__all__ = ["AS_JSON", "VERBS", "Verb"]

AS_JSON: ContextVar[bool] = ContextVar("AS_JSON", default=False)
"""Whether the command line says --json."""


class Verb(NamedTuple):
    """A module of `experiments/` with `main(arguments) -> exit code`, and what `--help` says of it.

    A module that reads a Hydra configuration names it in `CONFIG`, or finds it in `keys(arguments)`: `--help` lists
    its keys, and then prints its `ABOUT` where there is one.
    """

    module: str
    summary: str
    arguments: str = "[KEY=VALUE ...]"


VERBS = {
    "plan": Verb("cli.plan", "what each method makes of the same packs: balance, rows that travel, saving"),
    "train": Verb("cli.train", "train one model under one method"),
    "sweep": Verb("sweep.sweep", "train under several methods, compare them, write table, figure and page"),
    "simulate": Verb("cli.simulate", "what each method would cost on a cluster: time, traffic, memory, which to take"),
    "bench": Verb(
        "cli.bench",
        "measure one part: planner, awkward, attention or exchange; for the simulator: calibrate, paper_fit",
        "NAME [KEY=VALUE ...]",
    ),
    "report": Verb(
        "sweep.report",
        "rebuild a sweep's table, figure and page from its rows",
        "DIRECTORY [baseline=NAME] [page=FILE]",
    ),
}
