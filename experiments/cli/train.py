"""`flashcp train`: one training run on its ranks; with -m a sweep (`flashcp.experiments.sweep.sweep`)."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from flashcp.experiments.cli import show
from flashcp.experiments.cli.compose import Job, Multirun, is_multirun, run_app
from flashcp.experiments.cli.launch import Run, launch, rank_environment, start_ranks
from flashcp.experiments.folders import check_out
from flashcp.experiments.sweep.results import NO_OVERLAP, commit
from flashcp.files import read_path
from flashcp.limits import Count, Natural
from flashcp.options import read_sharding
from flashcp.schema import read_dataclass
from flashcp.sharding.methods import METHODS
from flashcp.train.config import TrainConfig
from flashcp.train.data.sources import SOURCES, DataConfig, open_source
from flashcp.train.replay import KeptStep
from flashcp.train.run import prepare

CONFIG = "train"


@dataclass
class SweepSettings:
    """What only `flashcp sweep` reads."""

    name: str = "sweep"
    baseline: str = "llama3"
    reference: bool = True
    rerun: bool = False
    turns: bool = True


@dataclass
class RunSettings(TrainConfig):
    """`conf/train.yaml`: what the ranks read, and what starts them."""

    out: str = ""
    world_size: Count = 2
    threads: Count = 1
    max_restarts: Natural = 0
    method: str = ""
    replay: str = ""
    sweep: SweepSettings = field(default_factory=SweepSettings)


def read_run(values: Mapping[str, Any], label: str = "") -> Run:
    """A run from a composed `conf/train.yaml`. label: added to its case.

    Raises ValueError naming value, field and legal values.
    """
    if values["data"].get("source") not in SOURCES:
        open_source(DataConfig(source=values["data"].get("source")))  # says why it cannot be trained on
    settings = read_dataclass(RunSettings, values)
    own = {item.name: getattr(settings, item.name) for item in dataclasses.fields(TrainConfig)}
    config = TrainConfig(**{**own, "out": settings.out or "outputs", "sharding": read_sharding(settings.sharding)})
    config.check(settings.world_size)
    alone = dataclasses.replace(config.parallel, transport="auto", head_ranks=1)
    alone.operator(config.exchange.name)  # it knows its legal values
    short = f"{config.context // 1024}k" if config.context % 1024 == 0 else str(config.context)
    batch = f"-b{config.batch_windows}" if config.batch_windows > 1 else ""
    case = f"{config.data.source}-c{short}-n{settings.world_size}{batch}"
    pair = (config.sharding["name"], config.exchange.name)
    names = [name for name, published in METHODS.items() if published[1:] == pair]
    provider = settings.method if settings.method in names else next(iter(names), "+".join(pair))
    if config.data_parallel > 1:
        provider = f"{provider}-dp{config.data_parallel}"
    if settings.sweep.baseline == NO_OVERLAP:
        throttle = config.parallel.throttle_gbps
        case = f"{case}-{provider}" + (f"-{throttle:g}gbps" if throttle else "")
        provider = config.parallel.overlap
    if settings.max_restarts and not (config.checkpoint.every and config.checkpoint.resume == "latest"):
        raise ValueError(
            f"max_restarts={settings.max_restarts} with checkpoint.every={config.checkpoint.every} and "
            f"checkpoint.resume={config.checkpoint.resume}: expected checkpoints to start again from, and latest"
        )
    return Run(case + label, provider, settings.world_size, settings.threads, config, settings.max_restarts)


def train(job: Job) -> float | None:
    """Train; the exit code is the ranks'. With --json the run's summary.json goes to standard output.

    Of a multirun: returns the final loss, for sweepers that ask for it.
    """
    if job.settings["replay"]:
        _replay(job)
        return None
    if is_multirun():
        return Multirun.run_job(job)
    one = read_run(job.settings).placed(job.settings["out"] or "outputs/train", group="", tags=[commit()])
    check_out(one.out)
    prepare(one.config, one.world_size)
    outcome = launch(one)
    if outcome.code:
        print(f"flashcp: error: {outcome.error}", file=sys.stderr)
        sys.exit(outcome.code)
    summary = json.loads((one.out / "summary.json").read_text())
    if one.config.profile:
        from flashcp.experiments.cli.timeline import draw_timeline

        print(f"timeline: {draw_timeline(one.out) or 'no whole attention call was profiled'}", file=sys.stderr)
    step, speed = summary["step_ms"]["median"], summary["tokens_per_s"]["median"]
    text = f"{one.provider}: {summary['steps']} steps on {one.world_size} ranks, final loss {summary['final_loss']:.4f}"
    show(summary, f"{text}, {step:.0f} ms a step, {speed:.0f} tokens/s; written to {one.out}")
    return None


def _replay(job: Job) -> None:
    """Compute a step that a run kept once more, on as many ranks; what comes out goes to standard output."""
    for word in job.overrides:
        if is_multirun() or not word.startswith(("replay=", "threads=")):
            raise ValueError(f"replay= with {word}: expected replay= alone, or threads= too")
    step = KeptStep.read(read_path(job.settings["replay"], "replay"))
    step.windows()
    print(f"the run found: {step.found}", file=sys.stderr)
    arguments, environment = ["-m", "flashcp.train.replay", str(step.folder)], rank_environment(step.config)
    log = step.folder / "ranks.log"
    outcome = start_ranks(arguments, step.world_size, job.settings["threads"], log, environment, lambda: None)
    if outcome.code:
        print(f"flashcp: error: {outcome.error}", file=sys.stderr)
        sys.exit(outcome.code)
    found = log.read_text(encoding="utf-8").splitlines()[-1]
    show({"found": found}, found)


main = partial(run_app, train, CONFIG)
