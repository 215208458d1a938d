"""Parts about a machine as a whole: what it overlaps, the simulator's parameters of it, whole layers on it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from itertools import product

import torch

from flashcp.clusters import read_cluster
from flashcp.experiments.bench import virtual as bench_virtual
from flashcp.experiments.bench.calibrate import CalibrateBench, bench_calibrate, calibration_table, write_calibration
from flashcp.experiments.bench.calibration import DIRECTIONS, SPLITS, errors
from flashcp.experiments.bench.kernel_times import KernelTimer, MeasuredPlanned
from flashcp.experiments.campaign.part import Case, Part, Turn
from flashcp.experiments.sweep.results import Number, read_rows
from flashcp.sharding.lengths import windows
from flashcp.sharding.methods import METHODS
from flashcp.simulator.cost import AttentionShape
from flashcp.simulator.machine import parameters
from flashcp.simulator.pack import Batch, simulate_batch
from flashcp.simulator.planned import Setting
from flashcp.simulator.variants import VARIANTS, WINDOW

# --- what overlap hides between ranks that are streams of one process (`bench/virtual.py`)

SIZES = {
    "2_ranks_64k_8_heads": "--ranks 2 --tokens 65536 --heads 8 --head_dim 128",
    "4_ranks_64k_8_heads": "--ranks 4 --tokens 65536 --heads 8 --head_dim 128",
    "2_ranks_128k_32_heads": "--ranks 2 --tokens 131072 --heads 32 --head_dim 128",
}
SMALL_SIZES = {"tiny": "--ranks 2 --tokens 512 --heads 2 --head_dim 32"}


def _overlap(label: str, turn: Turn) -> Iterator[Number]:
    """The benchmark's rows, in its own words."""
    out = turn.folder / label
    with redirect_stdout(sys.stderr):
        bench_virtual.main([*(SMALL_SIZES | SIZES)[label].split(), "--out", str(out)])
    for row in read_rows(out):
        yield Number(row.provider, row.metric, row.unit, row.p20, row.median, row.p80)


OVERLAP = Part(
    "what none, staged and fused leave exposed, next to max(compute, transfer)",
    1.5,
    lambda small: [Case(label, 12, 60) for label in (SMALL_SIZES if small else SIZES)],
    _overlap,
)

# --- the simulator's parameters (`bench/calibrate.py`), with and without grouped heads

SHAPES = {
    "32x32": CalibrateBench(60, 5, [16_384, 65_536, 131_072], [2, 4, 8], 32, 32, 128, "bf16"),
    "32x8": CalibrateBench(60, 5, [16_384, 65_536, 131_072], [2, 4, 8], 32, 8, 128, "bf16"),
}
SMALL_SHAPES = {"tiny": CalibrateBench(10, 1, [256, 512], [2], 2, 2, 16, "fp32")}


def _calibrate(label: str, turn: Turn) -> Iterator[Number]:
    """Errors and parameters; the machine's file is written beside the rows."""
    found = list(bench_calibrate((SMALL_SHAPES | SHAPES)[label]))
    print(calibration_table(found), file=sys.stderr, flush=True)
    write_calibration(turn.folder / f"{label}.yaml", found)
    (calibration,) = found
    for direction, split in product(DIRECTIONS, SPLITS):
        told = errors(calibration.times, direction, split)
        yield Number("flashcp", f"{direction}_{split}_error_median", "1", None, told.median, None)
        yield Number("flashcp", f"{direction}_{split}_error_p95", "1", None, told.p95, None)
    for name, value in parameters(calibration.machine).items():
        yield Number("machine", name, name.rpartition("_")[2].rpartition(".")[2], None, float(value), None)


CALIBRATE = Part(
    "the simulator's parameters, fitted on half of some random schedules and checked on the other",
    1.5,
    lambda small: [Case(label, 40, 180) for label in (SMALL_SHAPES if small else SHAPES)],
    _calibrate,
)

# --- whole layers under every method: every rank's kernels run here, the exchange between them modelled

DATA = ("wlb_llm", "pile", "redpajama")
WINDOWS = 2
CONTEXT, RANKS = 131_072, 8
UNITS = {"mib": "MiB", "ms": "ms", "rows": "rows", "saving": "share", "imbalance": "max/mean"}
CLUSTERS = {"H100": "h100-nvlink", "H200": "h200-nvlink", "A100": "a100-nvlink"}
"""Links and copies of the machines in `conf/cluster/`, by what a GPU's name holds."""


def _windows(small: bool) -> list[Case]:
    """Some of each data set, in turn."""
    if small:
        return [Case("wlb_llm_window_0", 10, 120)]
    return [Case(f"{data}_window_{number}", 25, 120) for number, data in product(range(WINDOWS), DATA)]


def _layers(label: str, turn: Turn) -> Iterator[Number]:
    """Times, imbalance and saving of every method on one window."""
    data, _, number = label.partition("_window_")
    context, ranks = (512, 2) if turn.small else (CONTEXT, RANKS)
    shape = AttentionShape(2, 2, 16, 4) if turn.small else AttentionShape()
    timer = _timer(turn.device, shape)
    pack = list(windows(data, context, int(number) + 1, 0))[-1]
    device = torch.cuda.get_device_name(turn.device) if turn.device.type == "cuda" else ""
    cluster = next((name for part, name in CLUSTERS.items() if part in device), "h100-nvlink")
    setting = Setting(read_cluster(cluster), shape)
    batch = Batch([pack], ranks, setting, price=lambda plan, setting: MeasuredPlanned(plan, setting, timer))
    methods = [one for one in VARIANTS.values() if one.head_ranks or one.name in METHODS]  # a kernel takes all heads
    variants = [trial for one in methods for trial in one.trials(setting, ranks, WINDOW, head_ranks=1)]
    outcomes = simulate_batch(batch, variants)
    for name, outcome in ((variant.name, outcome) for variant, outcome in outcomes.items()):
        for metric, value in outcome._asdict().items():
            yield Number(name, metric, UNITS.get(metric.rpartition("_")[2], "1"), None, float(value), None)


@cache
def _timer(device: torch.device, shape: AttentionShape) -> KernelTimer:
    """Refuses a wrong kernel."""
    timer = KernelTimer(device)
    timer.check(shape)
    return timer


HYBRID = Part(
    "an attention layer under every method, its kernels measured, its exchange modelled",
    2.0,
    _windows,
    _layers,
    "kernel=measured exchange=modelled",
)
