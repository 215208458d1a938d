"""`flashcp sweep`, and `flashcp train -m`: a Hydra multirun whose jobs are training runs, and the report on them."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flashcp.experiments.cli import bench
from flashcp.experiments.cli.compose import Job, Multirun, composed_jobs, run_app
from flashcp.experiments.cli.launch import Run, launch, rank_environment
from flashcp.experiments.cli.train import CONFIG, read_run, train
from flashcp.experiments.folders import check_out
from flashcp.experiments.lab.cases import LabBench
from flashcp.experiments.sweep import simulations
from flashcp.experiments.sweep.compare import LOSS_TOLERANCE, Comparison, attribute
from flashcp.experiments.sweep.report import publish, read_baseline
from flashcp.experiments.sweep.results import (
    EMULATED,
    NO_OVERLAP,
    REFERENCE,
    Row,
    commit,
    left_out_row,
    read_rows,
    summary_rows,
    write_rows,
)
from flashcp.schema import read_dataclass
from flashcp.train.parallel import FREE, SLOWING
from flashcp.train.run import prepare
from flashcp.train.tracker import TrackerConfig, track_comparison

SHOWN = {"method", "data", "context", "world_size", "batch_windows", "data_parallel", "sharding", "exchange"}
"""Overrides that a job's case and provider show already."""


LAB = "experiment=lab"
"""Instead of training, `flashcp bench lab` for every combination of its keys (docs/lab.md)."""


def main(words: Sequence[str]) -> int:
    """Run every job that has no rows yet, then report on all. Exit code 1 when a job failed or losses disagree.

    A sweep of `conf/simulation/` trains nothing: `flashcp.experiments.sweep.simulations` runs it. Nor does one of labs.
    """
    if LAB in words:
        keys = [word for word in words if word != LAB]
        if not any(word.startswith(("-", "hydra")) or "${hydra" in word for word in keys):
            check_labs(keys)
        return bench.main(["lab", "hydra.mode=MULTIRUN", *keys])
    if simulations.is_simulation(words):
        return simulations.main(words)
    return run_app(train, CONFIG, ["hydra.mode=MULTIRUN", *words])


def check_labs(words: Sequence[str]) -> None:
    """Raise ValueError for keys of labs of which one cannot run, or two would write to one folder."""
    outs = []
    for settings in composed_jobs("bench/lab", words):
        outs.append(str(settings.pop("out")))
        read_dataclass(LabBench, settings).check()
    if twice := [out for out in outs if outs.count(out) > 1]:
        example = "out='outputs/lab/${nodes}_${link}' with the keys that vary"
        raise ValueError(f"out={twice[0]!r}: {len(twice)} labs would write there; expected {example}")


def track(comparison: Comparison, tracker: TrackerConfig, out: Path) -> None:
    """The comparison as one run of wandb: a table, a bar chart, the speedups as numbers of the summary."""
    own = ["exposed_ms", "hidden", "wait_ms"] if comparison.of_overlap else ["imbalance", "saving"]
    columns = ["case", "provider", *comparison.factors, *own]
    columns += ["attention_ms", "exposed_exchange_ms", "step_ms", "speedup", "final_loss"]
    summary: dict[str, float] = {}
    for kind in comparison.kinds:
        name = f"speedup_vs_{comparison.baseline}" + (f"/{kind}" if kind == EMULATED else "")
        means = comparison.mean_speedups(kind)
        summary |= {f"{name}/{provider}": value for provider, value in means.items()}
        if means:
            summary[name] = max(means.values())
    table = [[getattr(line, attribute(column)) for column in columns] for line in comparison.runs]
    track_comparison(tracker, out, columns, table, ("provider", "speedup"), summary)


class Sweep(Multirun):
    """The training runs of a sweep. All are composed and checked before the first begins, and those of a case take
    turns; launchers of other processes run each by itself."""

    config = CONFIG

    def start(self, settings: dict[str, Any]) -> None:
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
            check_out(run.out)
            prepare(replace(run.config, out=f"{run.out}.new"), run.world_size)  # whatever an older run left there

    def run(self, jobs: Sequence[Job], alone: bool = False) -> float | None:
        """Single processes first, then the runs of a case in turns. Returns the final loss of one that runs alone."""
        asked = [self.runs(job) for job in jobs]
        own = asked[-1][-1]
        if alone and (link := own.config.parallel.link) != FREE:
            raise ValueError(f"parallel.link={link}: expected Hydra's own launcher and sweeper: turns share its rate")
        left_out = {runs[-1].digest: (runs[-1], why) for runs in asked if (why := bypass(runs[-1]))}
        with self.changing_rows() as rows:
            for run, why in left_out.values():
                print(f"left out: {run.case} {run.provider}: {why}", file=sys.stderr)
                rows[:] = [*_without(rows, run), left_out_row(run.case, run.provider, why, run.digest)]
        kept = [runs for runs in asked if runs[-1].digest not in left_out]
        runs = {run.digest: run for of_job in kept for run in of_job}
        self.done = set() if self.rerun else runs.keys() & self.have_rows()
        waiting = [run for digest, run in runs.items() if digest not in self.done]
        if self.done:
            print(f"{len(self.done)} of {len(runs)} runs are in {self.out} already", file=sys.stderr)
        if waiting and (load := os.getloadavg()[0]) > (cores := os.cpu_count() or 1):
            noise = f"load {load:.1f} on {cores} cores before the sweep began"
            print(f"times will be noisy: {noise}", file=sys.stderr)
        steps = sum(run.config.loop.steps for run in waiting)
        with tqdm(total=steps, unit="step", disable=alone or not waiting) as self.bar:
            for group in self.groups(kept):
                self.train_together(group)
                with self.changing_rows() as rows:
                    for of_job in kept:
                        if of_job[-1] in group:
                            rows[:] = _named(rows, of_job[-1], of_job[0].digest if self.with_reference else "")
        made = [row.median for row in read_rows(self.out) if (row.config, row.metric) == (own.digest, "final_loss")]
        return next(iter(made), math.nan) if alone else None

    def have_rows(self) -> set[str]:
        return {row.config for row in read_rows(self.out)}

    def report(self) -> None:
        """Table, figure and pages of all rows. Exits 1 when a run failed or losses disagree."""
        comparison = publish(self.out, self.baseline)
        track(comparison, replace(self.tracker, group=self.name, job_type="compare"), self.out)
        worst = comparison.worst_difference
        disagree = self.exact and worst is not None and worst.loss_difference > LOSS_TOLERANCE
        if self.failures().items() - self.failed_before.items() or disagree:
            sys.exit(1)

    def runs(self, job: Job) -> list[Run]:
        """The runs that a job asks for: its own, after the single-process run it is compared with.

        One process has no link: the same run is the reference over every link.
        """
        told = self.swept - SHOWN - ({"parallel.overlap"} if self.baseline == NO_OVERLAP else set())
        free = {**job.settings, "parallel": {**job.settings["parallel"], "link": FREE}}

        def named(keys: set[str]) -> str:
            chosen = [item for item in job.overrides if item.split("=")[0] in keys]
            return "".join(f"-{item.removeprefix('parallel.')}" for item in chosen)

        own, alone = read_run(job.settings, named(told)), read_run(free, named(told - {"parallel.link"})).alone()
        return [self.placed(run) for run in ([alone, own] if self.with_reference else [own])]

    def placed(self, run: Run) -> Run:
        """The run in its directory, out/jobs/CASE/PROVIDER."""
        folder = self.out / "jobs" / re.sub(r"[^\w.=,+-]+", "_", run.case) / run.provider
        quiet = replace(run.config, loop=replace(run.config.loop, progress=False))
        return replace(run, config=quiet).placed(str(folder), self.name, [commit()])

    def groups(self, jobs: Sequence[Sequence[Run]]) -> list[list[Run]]:
        """The runs of the jobs, together those that take turns: of one case, and started alike."""
        found: dict[object, list[Run]] = {}
        for runs in zip(*jobs, strict=True):
            for run in runs:
                alike = run.case, run.threads, *sorted(rank_environment(run.config))
                group = found.setdefault(alike if self.turns else (*alike, run.digest), [])
                if run not in group:
                    group.append(run)
        return list(found.values())

    def train_together(self, group: Sequence[Run]) -> None:
        """Whatever of a group has no rows yet, in turns, the baseline among them even if it has. Where a run fails, all
        go on one after another; the one that fails then is reported and does not stop the others.

        A single process that other jobs compare with too is trained by one of them, and the others wait for it. So
        does another sweep for runs that take turns. Jobs of one run each do not keep each other out.
        """
        together = group[0].provider == REFERENCE or len(group) > 1
        with locked(group[0].out.parent) if together else nullcontext():
            if together and not self.rerun:
                self.done |= self.have_rows()
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
                run.out.mkdir(parents=True, exist_ok=True)
                (run.out / "failure.txt").write_text(error + "\n", encoding="utf-8")
                self.bar.write(f"failed: {run.case} {run.provider}: {error}", file=sys.stderr)

    def train(self, runs: Sequence[Run]) -> str:
        """Runs in turns, or one, from the beginning; their rows replace older ones of the same case and provider.

        Returns why they failed, else nothing.
        """
        begun, again, have = self.bar.n, 0, self.have_rows()
        for run in runs:
            shutil.rmtree(run.out, ignore_errors=True)
            again += run.config.loop.steps if run.digest in have and not self.rerun else 0
        at_work = runs[0].provider if len(runs) == 1 else f"{len(runs)} methods in turns"
        self.bar.set_description(f"{at_work}: ranks start")
        self.bar.total += again

        def watch() -> None:
            files = [run.out / "metrics.jsonl" for run in runs]
            done = sum(file.read_bytes().count(b"\n") for file in files if file.is_file())
            if begun + done > self.bar.n:
                self.bar.set_description(at_work, refresh=False)
                self.bar.update(begun + done - self.bar.n)
            elif sys.stderr.isatty():
                self.bar.refresh()  # time goes on

        outcome = launch(*runs, watch=watch)
        if outcome.code and len(runs) > 1:  # they go on one after another, from the beginning
            self.bar.n, self.bar.total = begun, self.bar.total - again
        else:  # a run may end before its last step
            self.bar.total += self.bar.n - begun - len(runs) * runs[0].config.loop.steps
        self.bar.refresh()
        if outcome.code:
            return outcome.error
        for run in runs:
            summary = json.loads((run.out / "summary.json").read_text())
            made = summary_rows(run.case, run.provider, run.digest, summary)
            with self.changing_rows() as rows:
                reference = next((row.reference for row in rows if row.config == run.digest), "")
                rows[:] = _without(rows, run) + [replace(row, reference=reference) for row in made]
        if how := summary["emulated"]:
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
    made = [row for row in rows if row.config == run.digest]
    names = dict.fromkeys((row.case, row.provider) for row in made)
    copied = next((name for name in names if name == (run.case, run.provider)), next(iter(names), None))
    mine = [row for row in made if (row.case, row.provider) == copied]
    own = [replace(row, case=run.case, provider=run.provider, reference=reference) for row in mine]
    return _without(rows, run) + own
