"""What a configuration of the simulator chooses: machine, heads, overlap, where times come from, methods."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from flashcp.experiments.plan import chosen_methods
from flashcp.experiments.schema import ModelShape
from flashcp.experiments.simulator.cluster_file import read_cluster_file
from flashcp.experiments.simulator.machine import Machine, read_machine
from flashcp.experiments.simulator.pack import Price
from flashcp.experiments.simulator.planned import Planned, Setting
from flashcp.experiments.simulator.variants import VARIANTS, Variant
from flashcp.sharding.cost import AttentionShape
from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.strategies import STRATEGIES
from flashcp.train.schema import read_dataclass

__all__ = [
    "Kernels",
    "check_cluster_file",
    "check_cpu_work",
    "chosen_machine",
    "chosen_variants",
    "read_kernels",
    "read_setting",
]

OVERLAPS = ("auto", "none", "staged", "fused")
KERNELS = ("modelled", "measured")
MOST_CPU_WORK = 1e11  # causal pairs x query heads x head_dim that are run on a CPU: some 20 minutes
MOST_RANKS = 1024


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
    if not 1 <= settings["world_size"] <= MOST_RANKS:
        raise ValueError(f"world_size={settings['world_size']}: expected a whole number >= 1 and <= {MOST_RANKS}")
    for field, value in (("overlap", OVERLAPS), ("gradient_bytes", (2, 4))):
        if settings[field] not in value:
            raise ValueError(f"{field}={settings[field]!r}: expected one of {', '.join(map(str, value))}")
    model = read_dataclass(ModelShape, settings["model"], "model")
    for name, number in asdict(model).items():
        if number < (0 if name == "ffn_dim" else 1):
            raise ValueError(f"model.{name}={number}: expected a whole number >= {0 if name == 'ffn_dim' else 1}")
    if model.query_heads % model.kv_heads:
        raise ValueError(
            f"model.query_heads={model.query_heads}: expected a multiple of model.kv_heads={model.kv_heads}"
        )
    shape = AttentionShape(model.query_heads, model.kv_heads, model.head_dim, model.dtype_bytes)
    # As in `ContextParallel`: `fused` is taken by name alone until a GPU has shown that it is faster.
    overlap = "staged" if settings["overlap"] == "auto" else settings["overlap"]
    return Setting(chosen_machine(settings), shape, overlap, settings["gradient_bytes"]), model


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

    from flashcp.experiments.kernel_times import KernelTimer
    from flashcp.experiments.simulator.measured import MeasuredPlanned

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


def chosen_variants(settings: Mapping[str, Any], model: ModelShape) -> list[Variant]:
    """The methods that were named, the pair that was chosen, or all. Left out with a word: what heads do not allow."""
    ranks = settings["world_size"]
    named, pair = settings["methods"], settings["method"] or settings["sharding"] or settings["exchange"]
    if named and pair:
        raise ValueError("methods and method, sharding or exchange: expected one or the other")
    chosen = [_variant(name) for name in dict.fromkeys(named)] or list(VARIANTS.values())
    if pair:
        (method,) = chosen_methods(settings)
        chosen = [VARIANTS.get(method.name, Variant(*method))]
    split = [variant for variant in chosen if variant.exchange == "ulysses"]
    if ranks < 1 or not split or not (model.query_heads % ranks or model.kv_heads % ranks):
        return chosen
    why = f"model.query_heads={model.query_heads}, model.kv_heads={model.kv_heads} are no multiples of {ranks} ranks"
    if len(split) == len(chosen):
        raise ValueError(f"{split[0].name}: {why}")
    print(f"left out: ulysses, for {why}", file=sys.stderr)
    return [variant for variant in chosen if variant.exchange != "ulysses"]


def _variant(name: str) -> Variant:
    """A method, or a pair of a strategy and an exchange under our implementation. Raises ValueError for others."""
    strategy, plus, exchange = name.partition("+")
    if name not in VARIANTS and not (plus and strategy in STRATEGIES and exchange in EXCHANGES):
        raise ValueError(f"methods: {name!r}: expected one of {', '.join(VARIANTS)}, or a pair SHARDING+EXCHANGE")
    return VARIANTS.get(name) or Variant(name, strategy, exchange)
