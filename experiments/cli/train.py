"""`flashcp train`: one training run on its ranks."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from flashcp.experiments.cli.compose import compose
from flashcp.experiments.cli.launch import launch
from flashcp.experiments.cli.settings import read_run
from flashcp.experiments.folders import check_out
from flashcp.experiments.provenance import commit
from flashcp.train.run import prepare

__all__ = ["CONFIG", "main"]

CONFIG = "train"


def main(overrides: Sequence[str], as_json: bool = False) -> int:
    """Train; the exit code is the ranks'. With as_json the run's summary.json goes to standard output."""
    settings = compose(CONFIG, overrides)
    run = read_run(settings).placed(settings["out"] or "outputs/train", group="", tags=[commit()])
    check_out(Path(run.config.out))
    prepare(run.config, run.world_size)
    outcome = launch(run)
    if outcome.code:
        print(f"flashcp: error: {outcome.error}", file=sys.stderr)
        return outcome.code
    out = Path(run.config.out)
    summary = json.loads((out / "summary.json").read_text())
    if run.config.profile:
        from flashcp.experiments.cli.timeline import draw_timeline

        print(f"timeline: {draw_timeline(out) or 'no whole attention call was profiled'}", file=sys.stderr)
    if as_json:
        print(json.dumps(summary, indent=1))
    else:
        step, speed = summary["step_ms"]["median"], summary["tokens_per_s"]["median"]
        print(
            f"{run.provider}: {summary['steps']} steps on {run.world_size} ranks, final loss "
            f"{summary['final_loss']:.4f}, {step:.0f} ms a step, {speed:.0f} tokens/s; written to {run.config.out}"
        )
    return 0
