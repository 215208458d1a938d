"""`flashcp sweep`, and `flashcp train -m`: a Hydra multirun whose jobs are training runs, and the report on them."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flashcp.experiments.cli import train as training
from flashcp.experiments.cli.compose import Job, run_app
from flashcp.experiments.cli.launch import launch, rank_environment
from flashcp.experiments.cli.settings import Run, read_run
from flashcp.experiments.provenance import commit
from flashcp.experiments.sweep import simulations
from flashcp.experiments.sweep.compare import LOSS_TOLERANCE, Comparison, attribute
from flashcp.experiments.sweep.multirun import Multirun
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
from flashcp.schema import read_dataclass
from flashcp.train.parallel import FREE, SLOWING
from flashcp.train.run import prepare
from flashcp.train.tracker import TrackerConfig, track_comparison

__all__ = ["CONFIG", "Sweep", "main"]

CONFIG = training.CONFIG
SHOWN = {"method", "data", "context", "world_size", "sharding", "exchange"}
"""Overrides that a job's case and provider show already."""


def main(words: Sequence[str]) -> int:
    """Run every job that has no rows yet, then report on all. Exit code 1 when a job failed or losses disagree.

    A sweep of `conf/simulation/` trains nothing: `flashcp.experiments.sweep.simulations` runs it.
    """
    if simulations.is_simulation(words):
        return simulations.main(words)
    return run_app(training.train, CONFIG, ["hydra.mode=MULTIRUN", *words])


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


class Sweep(Multirun):
    """The training runs of a sweep. All are composed and checked before the first begins, and those of a case take
    turns; launchers of other processes run each by itself."""

    config = CONFIG

    def start(self, settings: dict[str, Any]) -> None:
        from flashcp.experiments.sweep.report import read_baseline  # late: one run alone needs no pictures

        told = settings["sweep"]
        self.name, self.turns, self.rerun, self.with_reference = (
            told[key] for key in ("name", "turns", "rerun", "reference")
        )
        if Path(self.name).name != self.name:
            raise ValueError(f"sweep.name={self.name!r}: expected the name of a folder below outputs/")
        self.baseline = read_baseline(told["baseline"], "sweep.baseline")
        self.exact = settings["loop"]["precision"] == "fp32" and "loop.precision" not in self.swept
        self.tracker = read_dataclass(TrackerConfig, settings["tracker"], "tracker")
        self.failed_before = self.failures()

    def failures(self) -> dict[Path, int]:
        """Notes of runs that failed, and when."""
        return {file: file.stat().st_mtime_ns for file in self.out.glob("jobs/*/*/failure.txt")}

    def check(self, job: Job) -> None:
        for run in self.runs(job):
            if (link := run.config.parallel.link) != FREE and not self.turns:
                raise ValueError(f"sweep.turns=False with parallel.link={link}: expected true: turns share its rate")
            fresh = dataclasses.replace(run.config, out=f"{run.config.out}.new")  # whatever an older run left there
            prepare(fresh, run.world_size)

    def run_alone(self, job: Job) -> float | None:
        own = self.runs(job)[-1]
        if (link := own.config.parallel.link) != FREE:
            raise ValueError(f"parallel.link={link}: expected Hydra's own launcher and sweeper: turns share its rate")
        self.jobs = [job]
        self.run_all(shown=False)
        self.jobs = []
        rows = read_rows(self.out)
        losses = [row.median for row in rows if (row.config, row.metric) == (own.digest, "final_loss")]
        return losses[0] if losses else math.nan

    def run_all(self, shown: bool = True) -> None:
        """Single processes first, then the runs of a case in turns. shown: with a bar."""
        asked = [self.runs(job) for job in self.jobs]
        left_out = {runs[-1].digest: (runs[-1], why) for runs in asked if (why := bypass(runs[-1]))}
        with self.changing_rows() as rows:
            for run, why in left_out.values():
                print(f"left out: {run.case} {run.provider}: {why}", file=sys.stderr)
                rows[:] = [*_without(rows, run), left_out_row(run.case, run.provider, why, run.digest)]
        jobs = [runs for runs in asked if runs[-1].digest not in left_out]
        runs = {run.digest: run for of_job in jobs for run in of_job}
        self.done = set() if self.rerun else runs.keys() & {row.config for row in read_rows(self.out)}
        waiting = [run for digest, run in runs.items() if digest not in self.done]
        if self.done:
            print(f"{len(self.done)} of {len(runs)} runs are in {self.out} already", file=sys.stderr)
        if waiting and (load := os.getloadavg()[0]) > (os.cpu_count() or 1):
            print(
                f"times will be noisy: load {load:.1f} on {os.cpu_count()} cores before the sweep began",
                file=sys.stderr,
            )
        steps = sum(run.config.loop.steps for run in waiting)
        with tqdm(total=steps, unit="step", disable=not (waiting and shown)) as self.bar:
            for group in self.groups(jobs):
                self.train_together(group)
                with self.changing_rows() as rows:
                    for of_job in jobs:
                        if of_job[-1] in group:
                            rows[:] = _named(rows, of_job[-1], of_job[0].digest if self.with_reference else "")

    def report(self) -> None:
        """Table, figure and pages of all rows. Exits 1 when a run failed or losses disagree."""
        from flashcp.experiments.sweep.report import publish

        comparison = publish(self.out, self.baseline)
        track(comparison, dataclasses.replace(self.tracker, group=self.name, job_type="compare"), self.out)
        worst = comparison.worst_difference
        disagree = self.exact and worst is not None and (worst.loss_difference or 0.0) > LOSS_TOLERANCE
        if self.failures().items() - self.failed_before.items() or disagree:
            sys.exit(1)

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
        go on one after another; the one that fails then is reported and does not stop the others.

        A single process that other jobs compare with too is trained by one of them, and the others wait for it. So
        does another sweep for runs that take turns. Jobs of one run each do not keep each other out.
        """
        together = group[0].provider == REFERENCE or len(group) > 1
        with locked(Path(group[0].config.out).parent) if together else nullcontext():
            if together and not self.rerun:
                self.done |= {row.config for row in read_rows(self.out)}
            self._train_together(group)

    def _train_together(self, group: Sequence[Run]) -> None:
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
        have_rows = {row.config for row in read_rows(self.out)}
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
            made = summary_rows(run.case, run.provider, run.digest, summary)
            with self.changing_rows() as rows:
                reference = next((row.reference for row in rows if row.config == run.digest), "")
                rows[:] = _without(rows, run) + [dataclasses.replace(row, reference=reference) for row in made]
            how = summary["emulated"]
        if how:
            self.bar.write(f"{runs[0].case} is {EMULATED}: {how}", file=sys.stderr)
        return ""

    @contextmanager
    def changing_rows(self) -> Iterator[list[Row]]:
        """The rows in `out`, to be changed in place: read and written while no other job does."""
        with locked(self.out):
            rows = read_rows(self.out)
            yield rows
            write_rows(self.out, rows)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else who asks for this folder goes on before we are done with it."""
    folder.mkdir(parents=True, exist_ok=True)
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)


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
