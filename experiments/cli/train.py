"""`flashcp train`: one training run on its ranks; with -m a sweep (`flashcp.experiments.sweep.sweep`)."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from flashcp.experiments.cli.compose import Job, run_app
from flashcp.experiments.cli.launch import launch
from flashcp.experiments.cli.settings import read_run
from flashcp.experiments.cli.verbs import AS_JSON
from flashcp.experiments.folders import check_out
from flashcp.experiments.provenance import commit
from flashcp.experiments.sweep.multirun import Multirun, is_multirun
from flashcp.train.run import prepare

__all__ = ["CONFIG", "main", "train"]

CONFIG = "train"


def main(words: Sequence[str]) -> int:
    """Train; the exit code is the ranks'. With --json the run's summary.json goes to standard output."""
    return run_app(train, CONFIG, words)


def train(job: Job) -> float | None:
    """One job of `flashcp train`. Of a multirun: returns the final loss, for sweepers that ask for it."""
    if is_multirun():
        return Multirun.run_job(job)
    one = read_run(job.settings).placed(job.settings["out"] or "outputs/train", group="", tags=[commit()])
    out = Path(one.config.out)
    check_out(out)
    prepare(one.config, one.world_size)
    outcome = launch(one)
    if outcome.code:
        print(f"flashcp: error: {outcome.error}", file=sys.stderr)
        sys.exit(outcome.code)
    summary = json.loads((out / "summary.json").read_text())
    if one.config.profile:
        from flashcp.experiments.cli.timeline import draw_timeline

        print(f"timeline: {draw_timeline(out) or 'no whole attention call was profiled'}", file=sys.stderr)
    if AS_JSON.get():
        print(json.dumps(summary, indent=1))
    else:
        step, speed = summary["step_ms"]["median"], summary["tokens_per_s"]["median"]
        print(
            f"{one.provider}: {summary['steps']} steps on {one.world_size} ranks, final loss "
            f"{summary['final_loss']:.4f}, {step:.0f} ms a step, {speed:.0f} tokens/s; written to {out}"
        )
    return None
