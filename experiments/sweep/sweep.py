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
from flashcp.experiments.cli.launch import launch, rank_environment
from flashcp.experiments.cli.schema import committed
from flashcp.experiments.cli.settings import Run, read_run
from flashcp.experiments.folders import check_out
from flashcp.experiments.provenance import commit
from flashcp.experiments.sweep import simulations
from flashcp.experiments.sweep.compare import LOSS_TOLERANCE, Comparison, attribute
from flashcp.experiments.sweep.report import publish, read_baseline
from flashcp.experiments.sweep.results import (
    EMULATED,
    NO_OVERLAP,
    REFERENCE,
    Row,
    left_out_row,
    read_rows,
    summary_rows,
    write_rows,
)
from flashcp.experiments.sweep.simulations import is_simulation
from flashcp.train.link import FREE
from flashcp.train.parallel import SLOWING
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
    lines = [line for line in comparison.lines if line.provider != REFERENCE]
    own = ["exposed_ms", "hidden", "wait_ms"] if comparison.of_overlap else ["imbalance", "saving"]
    columns = [
        "case",
        "provider",
        *comparison.factors,
        *own,
        "attention_ms",
        "exposed_exchange_ms",
        "step_ms",
        "speedup",
        "final_loss",
    ]
    name = f"speedup_vs_{comparison.baseline}"
    summary: dict[str, float] = {}
    for kind in comparison.kinds:
        means, of_kind = comparison.mean_speedups(kind), name if kind != EMULATED else f"{name}/{kind}"
        summary |= {f"{of_kind}/{provider}": value for provider, value in means.items()}
        if means:
            summary[of_kind] = max(means.values())
    table = [[getattr(line, attribute(column)) for column in columns] for line in lines]
    track_comparison(tracker, out, columns, table, ("provider", "speedup"), summary)


class Sweep:
    """The jobs of one sweep and what became of them. Every job is composed and checked before the first one runs."""

    def __init__(self, overrides: Sequence[str]) -> None:
        self.jobs = jobs = expand(CONFIG, overrides)
        settings = jobs[0].settings
        self.name = settings["sweep"]["name"]
        self.baseline = read_baseline(settings["sweep"]["baseline"], "sweep.baseline")
        self.with_reference, self.rerun = settings["sweep"]["reference"], settings["sweep"]["rerun"]
        self.turns = settings["sweep"]["turns"]
        self.out = Path(settings["out"] or f"outputs/{self.name}")
        check_out(self.out)
        self.swept = _swept(jobs)
        asked = [self.runs(job) for job in jobs]
        self.left_out = {runs[-1].digest: (runs[-1], why) for runs in asked if (why := bypass(runs[-1]))}
        self.wanted = [runs for runs in asked if runs[-1].digest not in self.left_out]
        runs = [run for together in self.wanted for run in together]
        for run in (*runs, *(run for run, _ in self.left_out.values())):
            if (link := run.config.parallel.link) != FREE and not self.turns:
                raise ValueError(f"sweep.turns=False with parallel.link={link}: expected true: turns share its rate")
            fresh = dataclasses.replace(run.config, out=f"{run.config.out}.new")  # whatever an older run left there
            prepare(fresh, run.world_size)
        self.rows = read_rows(self.out)
        here = {run.digest for run in runs} & {row.config for row in self.rows}
        self.exact = all(run.config.loop.precision == "fp32" for run in runs)
        for run, why in self.left_out.values():
            print(f"left out: {run.case} {run.provider}: {why}", file=sys.stderr)
            row = left_out_row(run.case, run.provider, why, run.digest)
            self.rows = [*_without(self.rows, run), row]
        self.done = set() if self.rerun else here
        self.failed: list[str] = []
        self.tracker = dataclasses.replace(asked[0][-1].config.tracker, group=self.name, job_type="compare")
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
        of_link = {"parallel.link"}

        def named(keys: set[str]) -> str:
            chosen = [item for item in job.overrides if item.split("=")[0] in keys]
            return "".join(f"-{item.removeprefix('parallel.')}" for item in chosen)

        own = read_run(job.settings, named(told))
        # One process has no link: the same run is the reference over every link.
        parallel = {**job.settings["parallel"], "link": FREE}
        alone = read_run({**job.settings, "parallel": parallel}, named(told - of_link)).alone()
        return [self.placed(run) for run in ([alone, own] if self.with_reference else [own])]

    def placed(self, run: Run) -> Run:
        """The run in its directory, out/jobs/CASE/PROVIDER."""
        folder = self.out / "jobs" / re.sub(r"[^\w.=,+-]+", "_", run.case) / run.provider
        quiet = dataclasses.replace(run.config.loop, progress=False)
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, loop=quiet))
        return run.placed(str(folder), self.name, [commit()])

    def run(self) -> None:
        """What the jobs ask for: single processes first, then the runs of a case in turns."""
        if self.left_out:
            self.out.mkdir(parents=True, exist_ok=True)
            write_rows(self.out, self.rows)
        with self.bar:
            for group in self.groups(self.wanted):
                self.train_together(group)
                for runs in self.wanted:
                    if runs[-1] in group:
                        self.rows = _named(self.rows, runs[-1], runs[0].digest if self.with_reference else "")
                write_rows(self.out, self.rows)

    def groups(self, jobs: Sequence[Sequence[Run]]) -> list[list[Run]]:
        """The runs of the jobs, together those that take turns: of one case, and started alike."""
        found: dict[object, list[Run]] = {}
        for place in range(2 if self.with_reference else 1):
            for runs in jobs:
                run = runs[place]
                alike = run.case, run.threads, *sorted(rank_environment(run.config))
                key = alike if self.turns else (*alike, run.digest)
                if run not in found.setdefault(key, []):
                    found[key].append(run)
        return list(found.values())

    def train_together(self, group: Sequence[Run]) -> None:
        """Whatever of a group has no rows yet, in turns, the baseline among them even if it has. Where a run fails, all
        go on one after another; the one that fails then is reported and does not stop the others."""
        missing = {run.digest: run for run in group if run.digest not in self.done}
        self.done |= missing.keys()
        runs = list(missing.values())
        beside = [run for run in group if run.provider == self.baseline and run.digest not in missing][:1]
        if runs and self.turns and len(beside + runs) > 1:
            error = self.train(beside + runs)
            if not error:
                return
            self.bar.write(f"{group[0].case}: no turns, one after another ({error})", file=sys.stderr)
        for run in runs:
            if error := self.train([run]):
                folder = Path(run.config.out)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "failure.txt").write_text(error + "\n", encoding="utf-8")
                self.failed.append(run.provider)
                self.bar.write(f"failed: {run.case} {run.provider}: {error}", file=sys.stderr)

    def train(self, runs: Sequence[Run]) -> str:
        """Runs in turns, or one, from the beginning; their rows replace older ones of the same case and provider.

        Returns why they failed, else nothing.
        """
        folders, begun = [Path(run.config.out) for run in runs], self.bar.n
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        at_work = runs[0].provider if len(runs) == 1 else f"{len(runs)} methods in turns"
        self.bar.set_description(f"{at_work}: ranks start")
        steps = len(runs) * runs[0].config.loop.steps
        have_rows = {row.config for row in self.rows}
        again = 0 if self.rerun else sum(run.config.loop.steps for run in runs if run.digest in have_rows)
        self.bar.total += again

        def watch() -> None:
            files = [folder / "metrics.jsonl" for folder in folders]
            done = sum(file.read_bytes().count(b"\n") for file in files if file.is_file())
            if begun + done > self.bar.n:
                self.bar.set_description(at_work, refresh=False)
                self.bar.update(begun + done - self.bar.n)
            elif sys.stderr.isatty():
                self.bar.refresh()  # time goes on

        outcome = launch(*runs, watch=watch)
        if outcome.code and len(runs) > 1:  # they go on one after another, from the beginning
            self.bar.n, self.bar.total = begun, self.bar.total - again
        else:
            self.bar.total += self.bar.n - begun - steps  # a run may end before its last step
        self.bar.refresh()
        if outcome.code:
            return outcome.error
        how = ""
        for run, folder in zip(runs, folders, strict=True):
            summary = json.loads((folder / "summary.json").read_text())
            kept = _without(self.rows, run)
            reference = next((row.reference for row in self.rows if row.config == run.digest), "")
            made = summary_rows(run.case, run.provider, run.digest, summary)
            self.rows = kept + [dataclasses.replace(row, reference=reference) for row in made]
            how = summary["emulated"]
        if how:
            self.bar.write(f"{runs[0].case} is {EMULATED}: {how}", file=sys.stderr)
        return ""


def bypass(run: Run) -> str:
    """Why a run's rows would not leave as slowly as its link asks; empty where they do, or where the link is free."""
    parallel = run.config.parallel
    slowed = parallel.link != FREE or parallel.throttle_gbps
    if not slowed or parallel.transport in ("auto", *SLOWING):
        return ""
    return f"over {parallel.transport} rows leave at once, not over a slowed link; {' and '.join(SLOWING)} slow them"


def _without(rows: list[Row], run: Run) -> list[Row]:
    """All rows but those of a run's case and provider."""
    return [row for row in rows if (row.case, row.provider) != (run.case, run.provider)]


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
