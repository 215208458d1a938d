"""A rank of the lab, as torchrun starts it: `python -m flashcp.experiments.lab.step STEP SETTINGS.json OUT.jsonl`.

The step `rate` measures how fast the ranks attend, all at once; `run` is what the lab is for; any other is the name of
a method that meets faults.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from flashcp.experiments.lab.cases import LabBench
from flashcp.experiments.lab.faults import meet_faults
from flashcp.experiments.lab.rank import LabRank
from flashcp.schema import read_dataclass
from flashcp.train.ranks import exit_code, world


def main(arguments: Sequence[str] | None = None) -> int:
    """Be a rank. Returns 0; 2 for bad input; else 1."""
    step, settings, out = sys.argv[1:] if arguments is None else arguments
    bench = read_dataclass(LabBench, json.loads(Path(settings).read_text()))
    return exit_code(lambda: _run(step, bench, Path(out)))


def _run(step: str, bench: LabBench, out: Path) -> None:
    with world("cpu", bench.timeout_s) as ranks, out.open("a" if ranks.rank == 0 else "r") as file:
        lab = LabRank(bench, ranks, file)
        if step == "rate":
            lab.rate()
        elif step == "run":
            lab.gate()
            lab.measure()
        else:
            meet_faults(lab, step, out)


if __name__ == "__main__":
    sys.exit(main())
