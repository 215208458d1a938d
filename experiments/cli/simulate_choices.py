"""What a configuration of the simulator chooses: machine, heads, overlap, where times come from, methods."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flashcp.clusters import read_cluster_file, read_machine
from flashcp.experiments.cli.plan import chosen_methods
from flashcp.schema import read_dataclass
from flashcp.simulator.cost import AttentionShape, ModelShape
from flashcp.simulator.machine import Machine
from flashcp.simulator.pack import Price
from flashcp.simulator.planned import Planned, Setting
from flashcp.simulator.variants import (
    VARIANTS,
    Variant,
    choose_variants,
    make_setting,
    read_ranks,
    without_ulysses,
)

__all__ = [
    "Kernels",
    "check_cluster_file",
    "check_cpu_work",
    "chosen_machine",
    "chosen_variants",
    "read_kernels",
    "read_setting",
]

KERNELS = ("modelled", "measured")
MOST_CPU_WORK = 1e11  # causal pairs x query heads x head_dim that are run on a CPU: some 20 minutes


class Kernels(NamedTuple):
    """Where attention's times come from. device: what ran the kernels; empty where they are the cost model's."""

    price: Price = Planned
    device: str = ""

    @property
    def kind(self) -> str:
        """As a row says it."""
        return f"kernel={KERNELS[1]} exchange={KERNELS[0]}" if self.device else "simulated"


def read_setting(settings: Mapping[str, Any]) -> tuple[Setting, ModelShape]:
    """Machine, heads and overlap. Raises ValueError naming value, field and what is legal."""
    read_ranks(settings["world_size"])
    model = read_dataclass(ModelShape, settings["model"], "model")
    machine = chosen_machine(settings)
    return make_setting(machine, model, settings["overlap"], settings["gradient_bytes"], prefix="model."), model


def read_kernels(settings: Mapping[str, Any], setting: Setting) -> Kernels:
    """The cost model, or every rank's kernels run on a GPU, or where there is none on this CPU.

    Raises ValueError for what cannot be measured, RuntimeError where the kernel is wrong.
    """
    name = settings["kernel"]
    if name not in KERNELS:
        raise ValueError(f"kernel={name!r}: expected one of {', '.join(KERNELS)}")
    if name == "modelled":
        return Kernels()
    if settings["workers"] != 1:
        raise ValueError(f"workers={settings['workers']}: kernel=measured runs on one device, expected 1")
    if setting.shape.dtype_bytes not in (2, 4):
        raise ValueError(f"model.dtype_bytes={setting.shape.dtype_bytes}: kernel=measured expects 2 (bf16) or 4 (fp32)")
    import torch

    from flashcp.experiments.bench.kernel_times import KernelTimer
    from flashcp.experiments.sweep.measured import MeasuredPlanned

    torch.set_num_threads(1)  # as a rank on a CPU has
    timer = KernelTimer(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    timer.check(setting.shape)
    return Kernels(lambda plan, setting: MeasuredPlanned(plan, setting, timer), timer.device_name)


def check_cpu_work(packs: Sequence[np.ndarray], shape: AttentionShape) -> None:
    """Raise ValueError for windows whose kernels a CPU would run for hours."""
    pairs = sum(float((lengths * (lengths + 1.0)).sum()) / 2 for lengths in packs)
    work = pairs * shape.query_heads * shape.head_dim
    if work > MOST_CPU_WORK:
        raise ValueError(
            f"kernel=measured on a CPU: {work:.0e} causal pairs x heads x head_dim in all windows would take hours; "
            f"expected <= {MOST_CPU_WORK:.0e}, by fewer windows, a smaller context or model.*, or a GPU"
        )


def chosen_machine(settings: Mapping[str, Any]) -> Machine:
    """The cluster file's, or the group's. Raises ValueError for anything that describes none."""
    if settings["cluster_file"]:
        return read_cluster_file(settings["cluster_file"])
    return read_machine(settings["cluster"] or {})


def check_cluster_file(settings: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Raise ValueError where a cluster, or a part of one, is chosen beside the file that replaces it."""
    given = next((override for override in overrides if override.startswith(("cluster=", "cluster."))), "")
    if settings["cluster_file"] and given:
        raise ValueError(f"cluster_file={settings['cluster_file']!r} and {given}: expected one or the other")


def chosen_variants(settings: Mapping[str, Any], shape: AttentionShape) -> list[Variant]:
    """The methods that were named, the pair that was chosen, or all. Left out with a word: what heads do not allow."""
    named, pair = settings["methods"], settings["method"] or settings["sharding"] or settings["exchange"]
    if named and pair:
        raise ValueError("methods and method, sharding or exchange: expected one or the other")
    chosen = choose_variants(named)
    if pair:
        (method,) = chosen_methods(settings)
        chosen = [VARIANTS.get(method.name, Variant(*method))]
    kept, why = without_ulysses(chosen, shape, settings["world_size"], "model.")
    if why:
        print(f"left out: ulysses, for {why}", file=sys.stderr)
    return kept
