"""`flashcp simulate`: which method would be how fast on a cluster, before anyone rents it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from flashcp.experiments.compose import compose
from flashcp.experiments.options import naming_options
from flashcp.experiments.packs import read_packs
from flashcp.experiments.plan import chosen_methods, heading, plannable, strategy_options
from flashcp.experiments.provenance import commit
from flashcp.experiments.schema import ModelShape
from flashcp.experiments.simulator.batch import Options, simulate_packs
from flashcp.experiments.simulator.cluster_file import read_cluster_file
from flashcp.experiments.simulator.machine import Machine, read_machine
from flashcp.experiments.simulator.pack import Price
from flashcp.experiments.simulator.planned import Planned, Setting
from flashcp.experiments.simulator.summary import BASELINE, Summary, recommendation, summarise
from flashcp.experiments.simulator.variants import VARIANTS, Variant
from flashcp.experiments.text import table
from flashcp.sharding.cost import AttentionShape
from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.strategies import STRATEGIES, plan
from flashcp.train.schema import read_dataclass

__all__ = [
    "Kernels",
    "Simulated",
    "check_cluster_file",
    "chosen_machine",
    "chosen_variants",
    "main",
    "read_kernels",
    "read_setting",
    "simulate",
    "summary_table",
]

CONFIG = "simulate"
OVERLAPS = ("auto", "none", "staged", "fused")
KERNELS = ("modelled", "measured")
MOST_CPU_WORK = 1e11  # causal pairs x query heads x head_dim that are run on a CPU: some 20 minutes
MOST_RANKS = 1024
ABOUT = (
    "The table, means over windows: imbalance, work of the busiest rank over the mean; saving, 1 - KV rows on the "
    "critical rank over the all-gather's; module ms, one layer's attention module, forward and backward, which is "
    "attention ms, copies and exposed (an exchange that nothing hides); p50 and p95, of module ms over windows; step "
    "ms, all layers with their matrix products; KV GiB, the most of any window: others' KV that all layers keep for "
    "the backward, and one layer's buffers."
)
"""For --help."""


class Simulated(NamedTuple):
    """What one configuration comes to: packs, methods with their numbers, options of the strategy chosen."""

    setting: Setting
    packs: list[np.ndarray]
    variants: list[Variant]
    summaries: list[Summary]
    options: Options
    kernels: Kernels


class Kernels(NamedTuple):
    """Where attention's times come from. device: what ran the kernels; empty where they are the cost model's."""

    price: Price = Planned
    device: str = ""

    @property
    def kind(self) -> str:
        """As a row says it."""
        return f"kernel={KERNELS[1]} exchange={KERNELS[0]}" if self.device else "simulated"


def main(overrides: Sequence[str], as_json: bool = False) -> int:
    """Print the table and a recommendation, or one JSON document."""
    settings = compose(CONFIG, overrides)
    check_cluster_file(settings, overrides)
    if settings["figure"]:
        from flashcp.experiments.simulate_figure import check_figure, draw_timelines

        figure, ranks = check_figure(settings["figure"]), settings["world_size"]
    found = simulate(settings)
    if settings["figure"]:
        drawn = found.packs[0], found.variants, ranks, found.setting, figure, found.options, found.kernels.price
        draw_timelines(*drawn)
        print(f"wrote {figure}", file=sys.stderr)
    if as_json:
        print(json.dumps(_document(settings, found), indent=1))
    else:
        kernels = f", its kernels measured on {found.kernels.device}" if found.kernels.device else ""
        print(f"{heading(settings, found.packs)}; simulated on {found.setting.machine.name}{kernels}")
        print(f"{summary_table(found.summaries)}\n\n{recommendation(found.summaries)}")
    return 0


def simulate(settings: Mapping[str, Any], label: str = "") -> Simulated:
    """Run a configuration. label: of the bar. Raises ValueError naming value, field and what is legal."""
    options = strategy_options(settings)
    setting, model = read_setting(settings)
    variants = chosen_variants(settings, model)
    packs = plannable(
        read_packs(settings["data"], settings["context"], settings["windows"], settings["seed"]),
        settings["world_size"],
    )
    strategy = (settings["sharding"] or {}).get("name", "")
    with naming_options(options):
        plan(packs[0], settings["world_size"], strategy or "flashcp", **options)
    of_strategy = {strategy: options}
    kernels = read_kernels(settings, setting)
    if kernels.device == "cpu":
        _check_cpu_work(packs, setting.shape)
    outcomes = simulate_packs(
        packs,
        list(dict.fromkeys([VARIANTS[BASELINE], *variants])),
        settings["world_size"],
        setting,
        options=of_strategy,
        price=kernels.price,
        workers=settings["workers"],
        label=label,
    )
    rows = float(np.mean([pack.sum() for pack in packs])) / settings["world_size"]
    summaries = [summarise(variant, outcomes, setting, model, rows) for variant in variants]
    return Simulated(setting, packs, variants, summaries, of_strategy, kernels)


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
    overlap = "fused" if settings["overlap"] == "auto" else settings["overlap"]
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


def _check_cpu_work(packs: Sequence[np.ndarray], shape: AttentionShape) -> None:
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


def summary_table(summaries: Sequence[Summary]) -> str:
    """The numbers people ask for first, one line a method."""
    head = ["method", "imbalance", "saving", "attention ms", "copies", "exposed", "module ms", "p50", "p95"]
    head += [f"speedup over {BASELINE}", "step ms", "KV GiB"]
    rows = [
        [
            one.name,
            f"{one.imbalance:.3f}",
            f"{one.saving:.3f}",
            f"{one.attention_ms:.2f}",
            f"{one.copies_ms:.2f}",
            f"{one.exposed_exchange_ms:.2f}",
            f"{one.module_ms:.2f}",
            f"{one.module_ms_p50:.2f}",
            f"{one.module_ms_p95:.2f}",
            f"{one.speedup:.2f}",
            f"{one.step_ms:.0f}",
            f"{one.kv_buffer_mib / 1024:.1f}",
        ]
        for one in summaries
    ]
    return table(head, rows)


def _document(settings: Mapping[str, Any], found: Simulated) -> dict[str, Any]:
    setting = found.setting
    return {
        "kind": found.kernels.kind,
        "kernel_device": found.kernels.device,
        "commit": commit(),
        "cluster": asdict(setting.machine),
        "world_size": settings["world_size"],
        "context": settings["context"],
        "data": settings["data"],
        "seed": settings["seed"],
        "windows": len(found.packs),
        "documents": sum(len(lengths) for lengths in found.packs),
        "model": settings["model"],
        "overlap": setting.overlap,
        "gradient_bytes": setting.gradient_bytes,
        "baseline": BASELINE,
        "recommendation": recommendation(found.summaries),
        "methods": [one._asdict() for one in found.summaries],
    }
