"""`flashcp simulate`: which method would be how fast on a cluster, before anyone rents it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from flashcp.experiments.cli.compose import Job, run
from flashcp.experiments.cli.packs import read_packs
from flashcp.experiments.cli.plan import heading, plannable, strategy_options
from flashcp.experiments.cli.simulate_choices import (
    Kernels,
    check_cluster_file,
    check_cpu_work,
    chosen_variants,
    read_kernels,
    read_setting,
)
from flashcp.experiments.cli.verbs import AS_JSON
from flashcp.experiments.progress import bar
from flashcp.experiments.provenance import commit
from flashcp.options import naming_options
from flashcp.sharding.strategies import plan
from flashcp.simulation import summary_table
from flashcp.simulator.pack import Options, make_plans, simulate_module
from flashcp.simulator.planned import Setting
from flashcp.simulator.summary import BASELINE, Summary, recommendation, simulate_methods
from flashcp.simulator.variants import Variant

__all__ = ["Simulated", "main", "simulate"]

CONFIG = "simulate"
QUIET_S = 2.0  # a run shorter than this shows no bar
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


def main(words: Sequence[str]) -> int:
    """Print the table and a recommendation, or one JSON document."""
    return run(show_methods, CONFIG, words)


def show_methods(job: Job) -> None:
    """One job of `flashcp simulate`."""
    settings = job.settings
    check_cluster_file(settings, job.overrides)
    if settings["figure"]:
        from flashcp.experiments.plots import check_figure, draw_timelines

        figure = check_figure(settings["figure"])
    found = simulate(settings)
    if settings["figure"]:
        pack, ranks = found.packs[0], settings["world_size"]
        plans = make_plans(pack, found.variants, ranks, found.options)
        priced = {name: found.kernels.price(plan, found.setting) for name, plan in plans.items()}
        modules = {one.name: simulate_module(priced[one.sharding], one) for one in found.variants}
        title = f"{len(pack)} documents, {pack.sum()} tokens, {ranks} ranks, simulated on {found.setting.machine.name}"
        draw_timelines(modules, title, figure)
        print(f"wrote {figure}", file=sys.stderr)
    if AS_JSON.get():
        print(json.dumps(_document(settings, found), indent=1))
    else:
        kernels = f", its kernels measured on {found.kernels.device}" if found.kernels.device else ""
        print(f"{heading(settings, found.packs)}; simulated on {found.setting.machine.name}{kernels}")
        print(f"{summary_table(found.summaries)}\n\n{recommendation(found.summaries)}")


def simulate(settings: Mapping[str, Any], label: str = "") -> Simulated:
    """Run a configuration. label: of the bar. Raises ValueError naming value, field and what is legal."""
    options = strategy_options(settings)
    setting, model = read_setting(settings)
    variants = chosen_variants(settings, setting.shape)
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
        check_cpu_work(packs, setting.shape)
    summaries = simulate_methods(
        packs,
        variants,
        settings["world_size"],
        setting,
        model,
        options=of_strategy,
        price=kernels.price,
        workers=settings["workers"],
        watch=partial(bar, total=len(packs), unit="window", desc=label or None, delay=QUIET_S),
    )
    return Simulated(setting, packs, variants, summaries, of_strategy, kernels)


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
