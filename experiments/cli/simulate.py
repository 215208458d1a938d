"""`flashcp simulate`: which method would be how fast on a cluster, before anyone rents it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from flashcp.clusters import read_cluster_file, read_machine
from flashcp.experiments.cli import bar, show
from flashcp.experiments.cli.compose import Job, run
from flashcp.experiments.cli.packs import described, heading, planned_packs, read_model
from flashcp.experiments.cli.plan import chosen_methods, strategy_options
from flashcp.experiments.sweep.results import commit
from flashcp.options import naming_options
from flashcp.sharding.strategies import plan
from flashcp.simulation import summary_table
from flashcp.simulator.cost import AttentionShape, ModelShape
from flashcp.simulator.machine import Machine
from flashcp.simulator.module import simulate_module
from flashcp.simulator.pack import Batch, Options, Price
from flashcp.simulator.planned import Planned, Setting
from flashcp.simulator.summary import BASELINE, Summary, recommendation, simulate_methods
from flashcp.simulator.variants import (
    VARIANTS,
    Step,
    Variant,
    choose_variants,
    make_setting,
    read_head_ranks,
    read_ranks,
    read_step,
    that_share_heads,
)

CONFIG = "simulate"
MOST_CPU_WORK = 1e11  # causal pairs x query heads x head_dim that are run on a CPU: some 20 minutes
QUIET_S = 2.0  # a run shorter than this shows no bar


class Simulated(NamedTuple):
    """What one configuration comes to: packs, methods with their numbers, options of the strategy chosen.

    price: where attention's times come from. device: what ran the kernels; empty where they are the cost model's.
    """

    setting: Setting
    packs: list[np.ndarray]
    variants: list[Variant]
    summaries: list[Summary]
    options: Options
    price: Price
    device: str
    step: Step

    @property
    def kind(self) -> str:
        """As a row says it."""
        return "kernel=measured exchange=modelled" if self.device else "simulated"


def show_methods(job: Job) -> None:
    """Print the table and a recommendation, or one JSON document."""
    settings = job.settings
    check_cluster_file(settings, job.overrides)
    if settings["figure"]:
        if settings["batch_windows"] != 1:
            raise ValueError(f"figure={settings['figure']!r} with batch_windows: expected one or the other")
        from flashcp.experiments.plots import check_figure, draw_timelines

        figure = check_figure(settings["figure"])
    found = simulate(settings)
    setting, best = found.setting, recommendation(found.summaries)
    if settings["figure"]:
        pack, ranks = found.packs[0], settings["world_size"]
        batch = Batch([pack], ranks, setting, found.options, found.price)
        heads = {one.name: one.head_ranks for one in found.summaries}
        drawn = [one._replace(head_ranks=heads[one.name]).planned_by(settings["plan_by"]) for one in found.variants]
        modules = {one.name: simulate_module(batch.planned(one), one) for one in drawn}
        title = f"{len(pack)} documents, {pack.sum()} tokens, {ranks} ranks, simulated on {setting.machine.name}"
        title += f"\n{read_model(settings)}"
        draw_timelines(modules, title, figure)
        print(f"wrote {figure}", file=sys.stderr)
    document = {
        "kind": found.kind,
        "kernel_device": found.device,
        "commit": commit(),
        "cluster": asdict(setting.machine),
        **described(settings, found.packs),
        **found.step._asdict(),
        "model": settings["model"],
        "overlap": setting.overlap,
        "gradient_wire": setting.gradient_wire,
        "plan_by": settings["plan_by"],
        "baseline": BASELINE,
        "recommendation": best,
        "methods": [one._asdict() for one in found.summaries],
    }
    kernels = f", its kernels measured on {found.device}" if found.device else ""
    head = f"{heading(settings, found.packs)}; simulated on {setting.machine.name}{kernels}; {read_model(settings)}"
    show(document, f"{head}\n{summary_table(found.summaries)}\n\n{best}")


def simulate(settings: Mapping[str, Any], label: str = "") -> Simulated:
    """Run a configuration. label: of the bar. Raises ValueError naming value, field and what is legal."""
    options, ranks = strategy_options(settings), settings["world_size"]
    setting, model = read_setting(settings)
    step, heads = step_of(settings), read_head_ranks(settings["head_ranks"])
    variants = chosen_variants(settings, setting, step, heads)
    packs = planned_packs(settings)
    strategy = (settings["sharding"] or {}).get("name", "")
    with naming_options(options):
        plan(packs[0], ranks, strategy or "flashcp", **options)
    of_strategy = {strategy: options}
    price, device = read_kernels(settings, setting)
    if device == "cpu":
        check_cpu_work(packs, setting.shape)
    watch = partial(
        bar,
        total=len(packs) // step.windows,
        unit="step" if step.windows > 1 else "window",
        desc=label or None,
        delay=QUIET_S,
    )
    told: dict[str, Any] = {
        "step": step,
        "head_ranks": heads,
        "plan_by": settings["plan_by"],
        "options": of_strategy,
        "price": price,
        "workers": settings["workers"],
        "watch": watch,
    }
    summaries = simulate_methods(packs, variants, ranks, setting, model, **told)
    return Simulated(setting, packs, variants, summaries, of_strategy, price, device, step)


def read_setting(settings: Mapping[str, Any]) -> tuple[Setting, ModelShape]:
    """Machine, heads and overlap. Raises ValueError naming value, field and what is legal."""
    read_ranks(settings["world_size"])
    model = read_model(settings)
    machine = chosen_machine(settings)
    return make_setting(machine, model, settings["overlap"], settings["gradient_wire"], prefix="model."), model


def step_of(settings: Mapping[str, Any]) -> Step:
    """Batches, and who waits for whom. Raises ValueError naming value, field and what is legal."""
    told = (settings[key] for key in ("batch_windows", "micro_batches", "waits", "world_size"))
    return read_step(*told)


def read_kernels(settings: Mapping[str, Any], setting: Setting) -> tuple[Price, str]:
    """Price and device: the cost model's, or of every rank's kernels run on a GPU, or where there is none on this CPU.

    Raises ValueError for what cannot be measured, RuntimeError where the kernel is wrong.
    """
    if settings["kernel"] == "modelled":
        return Planned, ""
    if settings["workers"] != 1:
        raise ValueError(f"workers={settings['workers']}: kernel=measured runs on one device, expected 1")
    if setting.shape.dtype_bytes not in (2, 4):
        raise ValueError(f"model.dtype_bytes={setting.shape.dtype_bytes}: kernel=measured expects 2 (bf16) or 4 (fp32)")
    import torch

    from flashcp.experiments.bench.kernel_times import KernelTimer, MeasuredPlanned

    torch.set_num_threads(1)  # as a rank on a CPU has
    timer = KernelTimer(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    timer.check(setting.shape)
    return lambda plan, setting: MeasuredPlanned(plan, setting, timer), timer.device_name


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


def chosen_variants(settings: Mapping[str, Any], setting: Setting, step: Step, head_ranks: int) -> list[Variant]:
    """The methods that were named, the pair that was chosen, or all. Left out with a word: what heads do not allow."""
    named, pair = settings["methods"], settings["method"] or settings["sharding"] or settings["exchange"]
    if named and pair:
        raise ValueError("methods and method, sharding or exchange: expected one or the other")
    chosen = choose_variants(named)
    if pair:
        (method,) = chosen_methods(settings)
        chosen = [VARIANTS.get(method.name, Variant(*method))]
    kept, why = that_share_heads(chosen, setting, settings["world_size"], step, head_ranks, "model.")
    if why:
        print(f"left out: {why}", file=sys.stderr)
    return kept


main = partial(run, show_methods, CONFIG)
