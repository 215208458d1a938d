"""The jobs of a multirun, as Hydra's sweeper makes them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

from flashcp.experiments.cli.compose import Job, run_app

__all__ = ["expand"]


def expand(name: str, given: Sequence[str]) -> list[Job]:
    """Every job of `conf/NAME.yaml` with these overrides, in its order; none is checked or run."""
    jobs: list[Job] = []

    with tempfile.TemporaryDirectory() as folder:
        hydra = ["hydra.mode=MULTIRUN", f"hydra.sweep.dir={folder}", "~hydra.callbacks.sweep"]
        assert run_app(jobs.append, name, [*hydra, *given]) == 0
    return jobs
