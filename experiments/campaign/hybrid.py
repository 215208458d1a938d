"""Whole layers under every method: every rank's kernels run here, the exchange between them modelled."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

from flashcp.clusters import read_cluster
from flashcp.experiments.bench.kernel_times import KernelTimer
from flashcp.experiments.campaign.part import Case, Turn
from flashcp.experiments.sweep.measured import MeasuredPlanned
from flashcp.experiments.sweep.results import Failure, Number
from flashcp.sharding.lengths import windows
from flashcp.simulator.batch import make_plans
from flashcp.simulator.cost import AttentionShape
from flashcp.simulator.pack import simulate_plans
from flashcp.simulator.planned import Setting
from flashcp.simulator.variants import VARIANTS

__all__ = ["ABOUT", "KIND", "MINUTES", "cases", "measure"]

ABOUT = "an attention layer under every method, its kernels measured, its exchange modelled"
MINUTES = 2.0
KIND = "kernel=measured exchange=modelled"

DATA = ("wlb_llm", "pile", "redpajama")
WINDOWS = 2
CONTEXT, RANKS = 131_072, 8
UNITS = {"mib": "MiB", "ms": "ms", "rows": "rows", "saving": "share", "imbalance": "max/mean"}
CLUSTERS = {"H100": "h100-nvlink", "H200": "h200-nvlink", "A100": "a100-nvlink"}
"""Links and copies of the machines in `conf/cluster/`, by what a GPU's name holds."""


def cases(small: bool) -> list[Case]:
    """Some windows of each data set, in turn."""
    if small:
        return [Case("wlb_llm_window_0", 10, 120)]
    return [Case(f"{data}_window_{number}", 25, 120) for number in range(WINDOWS) for data in DATA]


def measure(label: str, turn: Turn) -> Iterator[Number | Failure]:
    """Times, imbalance and saving of every method on one window."""
    data, _, number = label.partition("_window_")
    context, ranks = (512, 2) if turn.small else (CONTEXT, RANKS)
    shape = AttentionShape(2, 2, 16, 4) if turn.small else AttentionShape()
    timer = _timer(turn.device, shape)
    pack = list(windows(data, context, int(number) + 1, 0))[-1]
    device = torch.cuda.get_device_name(turn.device) if turn.device.type == "cuda" else ""
    cluster = next((name for part, name in CLUSTERS.items() if part in device), "h100-nvlink")
    setting = Setting(read_cluster(cluster), shape)
    variants = list(VARIANTS.values())
    plans = make_plans(pack, variants, ranks, {})
    outcomes = simulate_plans(plans, variants, setting, lambda plan, setting: MeasuredPlanned(plan, setting, timer))
    for name, outcome in outcomes.items():
        for metric, value in outcome._asdict().items():
            yield Number(name, metric, UNITS.get(metric.rpartition("_")[2], "1"), None, float(value), None)


@cache
def _timer(device: torch.device, shape: AttentionShape) -> KernelTimer:
    """Refuses a wrong kernel."""
    timer = KernelTimer(device)
    timer.check(shape)
    return timer
