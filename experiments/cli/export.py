"""`flashcp export CHECKPOINT out=FOLDER`: a checkpoint as Transformers loads models."""

from __future__ import annotations

from collections.abc import Sequence

from flashcp.experiments.cli import show
from flashcp.experiments.folders import check_out
from flashcp.files import read_path
from flashcp.train.export import export

WORDS = "CHECKPOINT out=FOLDER [tokenizer=FILE|none]"


def main(arguments: Sequence[str]) -> int:
    """CHECKPOINT: a step_* folder, or that of a run, whose latest checkpoint is meant."""
    options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    places = [argument for argument in arguments if "=" not in argument]
    for key in options.keys() - {"out", "tokenizer"}:
        raise ValueError(f"{key}: no such override; expected out or tokenizer")
    if len(places) != 1 or not options.get("out"):
        raise ValueError(f"{len(places)} checkpoints and out={options.get('out', '')!r}: expected {WORDS}")
    out = read_path(options["out"], "out")
    check_out(out.parent)
    written = export(read_path(places[0], "checkpoint"), out, options.get("tokenizer", ""))
    text = f"{written.kind} of step {written.step}, {written.parameters:,} parameters"
    show({"out": str(out), **written._asdict()}, f"{text}; written to {out}")
    return 0
