"""The simulator's parameters of this machine (`bench/calibrate.py`)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product

from flashcp.experiments.bench.calibrate import CalibrateBench, bench_calibrate, calibration_table, write_calibration
from flashcp.experiments.bench.calibration.times import DIRECTIONS, SPLITS, errors
from flashcp.experiments.campaign.part import Case, Turn
from flashcp.experiments.sweep.results import Failure, Number
from flashcp.simulator.machine import parameters

__all__ = ["ABOUT", "KIND", "MINUTES", "cases", "measure"]

ABOUT = "the simulator's parameters, fitted on half of some random schedules and checked on the other"
MINUTES = 1.5
KIND = "measured"

SHAPES = {
    "32x32": CalibrateBench(60, 5, [16_384, 65_536, 131_072], [2, 4, 8], 32, 32, 128, "bf16"),
    "32x8": CalibrateBench(60, 5, [16_384, 65_536, 131_072], [2, 4, 8], 32, 8, 128, "bf16"),
}
SMALL = {"tiny": CalibrateBench(10, 1, [256, 512], [2], 2, 2, 16, "fp32")}


def cases(small: bool) -> list[Case]:
    """With and without grouped heads."""
    return [Case(label, 40, 180) for label in (SMALL if small else SHAPES)]


def measure(label: str, turn: Turn) -> Iterator[Number | Failure]:
    """Errors and parameters; the machine's file is written beside the rows."""
    found = list(bench_calibrate((SMALL | SHAPES)[label]))
    print(calibration_table(found), file=sys.stderr, flush=True)
    write_calibration(turn.folder / f"{label}.yaml", found)
    (calibration,) = found
    for direction, split in product(DIRECTIONS, SPLITS):
        told = errors(calibration.times, direction, split)
        yield Number("flashcp", f"{direction}_{split}_error_median", "1", None, told.median, None)
        yield Number("flashcp", f"{direction}_{split}_error_p95", "1", None, told.p95, None)
    for name, value in parameters(calibration.machine).items():
        yield Number("machine", name, name.rpartition("_")[2].rpartition(".")[2], None, float(value), None)
