"""`flashcp sweep`: a Hydra multirun whose jobs are training runs, and the report on them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from flashcp.experiments.cli.compose import Job, expand
from flashcp.experiments.cli.launch import launch
from flashcp.experiments.cli.schema import committed
from flashcp.experiments.cli.settings import Run, read_run
from flashcp.experiments.folders import check_out
from flashcp.experiments.provenance import commit
from flashcp.experiments.sweep import simulations
from flashcp.experiments.sweep.comparison import LOSS_TOLERANCE, NO_OVERLAP, Comparison
from flashcp.experiments.sweep.report import publish, read_baseline
from flashcp.experiments.sweep.rows import Row, read_rows, summary_rows, write_rows
from flashcp.experiments.sweep.simulations import is_simulation
from flashcp.train.run import prepare
from flashcp.train.tracker import TrackerConfig, track_comparison

__all__ = ["CONFIG", "main"]

CONFIG = "train"
SHOWN = {"method", "data", "context", "world_size", "sharding", "exchange"}
"""Overrides that a job's case and provider show already."""


def main(overrides: Sequence[str], as_json: bool = False) -> int:
    """Run every job that has no rows yet, then report on all. Exit code 1 when a job failed or losses disagree.

    A sweep of `conf/simulation/` trains nothing: `flashcp.experiments.sweep.simulations` runs it.
    """
    if is_simulation(overrides):
        return simulations.main(overrides, as_json)
    _check_experiment(overrides)
    sweep = Sweep(overrides)
    sweep.run()
    comparison = publish(sweep.out, sweep.baseline, as_json)
    track(comparison, sweep.tracker, sweep.out)
    worst = comparison.worst_difference
    disagree = sweep.exact and worst is not None and (worst.loss_difference or 0.0) > LOSS_TOLERANCE
    return int(bool(sweep.failed) or disagree)


def _check_experiment(overrides: Sequence[str]) -> None:
    """Hydra, asked for a sweep that trains, would name only those."""
    trained, simulated = committed("experiment"), committed("simulation")
    for override in overrides:
        key, _, value = override.partition("=")
        names = value.split(",") if key == "experiment" else []
        for name in names:
            if name not in (*trained, *simulated, "null"):
                raise ValueError(f"experiment={name}: expected one of {', '.join((*trained, *simulated))}")
        if set(names) & set(simulated):
            raise ValueError(f"{override}: expected one sweep that simulates at a time")


def track(comparison: Comparison, tracker: TrackerConfig, out: Path) -> None:
    """The comparison as one run of wandb: a table, a bar chart, the speedups as numbers of the summary."""
    lines = [line for line in comparison.lines if not line.is_single]
    own = ["exposed_ms", "hidden", "wait_ms"] if comparison.of_overlap else ["imbalance", "saving"]
    columns = ["case", "provider", *own, "attention_ms", "exposed_exchange_ms", "step_ms", "speedup", "final_loss"]
    name = f"speedup_vs_{comparison.baseline}"
    summary: dict[str, float] = {f"{name}/{provider}": value for provider, value in comparison.mean_speedups().items()}
    if summary:
        summary[name] = max(summary.values())
    table = [[getattr(line, column) for column in columns] for line in lines]
    track_comparison(tracker, out, columns, table, ("provider", "speedup"), summary)


class Sweep:
    """The jobs of one sweep and what became of them. Every job is composed and checked before the first one runs."""

    def __init__(self, overrides: Sequence[str]) -> None:
        self.jobs = jobs = expand(CONFIG, overrides)
        settings = jobs[0].settings
        self.name = settings["sweep"]["name"]
        self.baseline = read_baseline(settings["sweep"]["baseline"], "sweep.baseline")
        self.with_reference, self.rerun = settings["sweep"]["reference"], settings["sweep"]["rerun"]
        self.out = Path(settings["out"] or f"outputs/{self.name}")
        check_out(self.out)
        self.swept = _swept(jobs)
        runs = [run for job in jobs for run in self.runs(job)]
        for run in runs:
            fresh = dataclasses.replace(run.config, out=f"{run.config.out}.new")  # whatever an older run left there
            prepare(fresh, run.world_size)
        self.rows = read_rows(self.out)
        here = {run.digest for run in runs} & {row.config for row in self.rows}
        self.exact = all(run.config.loop.precision == "fp32" for run in runs)
        self.done = set() if self.rerun else here
        self.failed: list[str] = []
        self.tracker = dataclasses.replace(runs[0].config.tracker, group=self.name, job_type="compare")
        waiting = {run.digest: run.config.loop.steps for run in runs if run.digest not in self.done}
        if self.done:
            print(
                f"{len(self.done)} of {len({run.digest for run in runs})} runs are in {self.out} already",
                file=sys.stderr,
            )
        if waiting and (load := os.getloadavg()[0]) > (os.cpu_count() or 1):
            print(
                f"times will be noisy: load {load:.1f} on {os.cpu_count()} cores before the sweep began",
                file=sys.stderr,
            )
        self.bar = tqdm(total=sum(waiting.values()), unit="step", disable=not waiting)

    def runs(self, job: Job) -> list[Run]:
        """The runs that a job asks for: its own, after the single-process run it is compared with."""
        told = self.swept - SHOWN - ({"parallel.overlap"} if self.baseline == NO_OVERLAP else set())
        label = "".join(f"-{item}" for item in job.overrides if item.split("=")[0] in told)
        own = read_run(job.settings, label)
        return [self.placed(run) for run in ([own.alone(), own] if self.with_reference else [own])]

    def placed(self, run: Run) -> Run:
        """The run in its directory, out/jobs/CASE/PROVIDER."""
        folder = self.out / "jobs" / re.sub(r"[^\w.=,+-]+", "_", run.case) / run.provider
        quiet = dataclasses.replace(run.config.loop, progress=False)
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, loop=quiet))
        return run.placed(str(folder), self.name, [commit()])

    def run(self) -> None:
        """Every job, one after another."""
        with self.bar:
            for job in self.jobs:
                self.run_job(job)

    def run_job(self, job: Job) -> None:
        """Whatever of a job's runs has no rows yet. A failed run is reported and does not stop the others."""
        runs = self.runs(job)
        reference = runs[0].digest if self.with_reference else ""
        for run in runs:
            if run.digest not in self.done:
                self.done.add(run.digest)
                self.train(run)
        own = runs[-1]
        self.rows = _named(self.rows, own, reference)
        write_rows(self.out, self.rows)

    def train(self, run: Run) -> None:
        """One run, from its beginning; its rows replace older ones of the same case and provider."""
        folder, begun = Path(run.config.out), self.bar.n
        metrics, failure = folder / "metrics.jsonl", folder / "failure.txt"
        shutil.rmtree(folder, ignore_errors=True)
        self.bar.set_description(run.provider)

        def watch() -> None:
            steps = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
            if begun + steps > self.bar.n:
                self.bar.update(begun + steps - self.bar.n)

        outcome = launch(run, watch)
        self.bar.total += self.bar.n - begun - run.config.loop.steps  # a run may end before its last step
        self.bar.refresh()
        if outcome.code:
            folder.mkdir(parents=True, exist_ok=True)
            failure.write_text(outcome.error + "\n", encoding="utf-8")
            self.failed.append(run.provider)
            self.bar.write(f"failed: {run.case} {run.provider}: {outcome.error}", file=sys.stderr)
            return
        summary = json.loads((folder / "summary.json").read_text())
        self.rows = [row for row in self.rows if (row.case, row.provider) != (run.case, run.provider)]
        self.rows += summary_rows(run.case, run.provider, run.digest, summary)


def _named(rows: list[Row], run: Run, reference: str) -> list[Row]:
    """All rows, the run's last. Another sweep may have made them and have other names for them: its copy stays."""
    name = (run.case, run.provider)
    made = [row for row in rows if row.config == run.digest]
    names = [(row.case, row.provider) for row in made]
    copied = name if name in names else next(iter(names), name)
    mine = [row for row in made if (row.case, row.provider) == copied]
    others = [row for row in rows if (row.case, row.provider) != name]
    return others + [dataclasses.replace(row, case=name[0], provider=name[1], reference=reference) for row in mine]


def _swept(jobs: Sequence[Job]) -> set[str]:
    """Keys of the overrides that differ between jobs."""
    values: dict[str, set[str]] = {}
    for job in jobs:
        for item in job.overrides:
            values.setdefault(item.split("=")[0], set()).add(item)
    return {key for key, found in values.items() if len(found) > 1}
