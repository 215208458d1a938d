"""Many packs' outcomes as the numbers people ask for, and what they say to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from flashcp.sharding.batch import map_ordered
from flashcp.sharding.plan import ShardingPlan
from flashcp.simulator.cost import ModelShape, layer_flops
from flashcp.simulator.pack import Batch, Options, Outcome, Pack, Price, simulate_batch
from flashcp.simulator.planned import Planned, Setting
from flashcp.simulator.variants import VARIANTS, WINDOW, Step, Variant

BASELINE = "llama3"
"""Speedups are over this method as published."""
TIE = 1.02
"""Times that differ by less are called the same: the model tells no more."""
NEAR = 2.5
"""Head ranks with which plans by rows take so many times as long as with the best get no plans by time."""
Watch = Callable[[Iterable[Any]], Iterable[Any]]


class Summary(NamedTuple):
    """One method over all steps; means where nothing else is said.

    module_ms and its parts: of a micro-batch, until the slowest rank of the whole job is through. data_parallel:
    replicas that share its windows. head_ranks: of a holder, for methods that may choose those that are fastest.
    overlap: `ring` and `none` are the published methods' own. speedup: the baseline's summed module_ms over this
    method's; of a whole step, step_speedup. speedup_p50, _p95: of single packs. forward_*: of the forward alone.
    layer_ms: the module with the layer's matrix products; step_ms: of all layers, without embeddings, loss and
    optimizer. kv_buffer_mib: others' KV that all layers keep for the backward, and one layer's buffers; the most of
    any step. tokens_imbalance: most tokens of a rank over the mean; its matrix products take as much longer.
    """

    name: str
    sharding: str
    exchange: str
    implementation: str
    overlap: str
    data_parallel: int
    head_ranks: int
    gradient_bytes: int
    imbalance: float
    imbalance_max: float
    critical_rows: float
    saving: float
    attention_ms: float
    attention_forward_ms: float
    exchange_ms: float
    exposed_exchange_ms: float
    copies_ms: float
    module_ms: float
    module_ms_p50: float
    module_ms_p95: float
    speedup: float
    speedup_p50: float
    speedup_p95: float
    forward_ms: float
    forward_speedup: float
    layer_ms: float
    step_ms: float
    step_speedup: float
    kv_buffer_mib: float
    tokens_imbalance: float


def simulate_methods(
    packs: Sequence[Pack],
    variants: Sequence[Variant],
    world_size: int,
    setting: Setting,
    model: ModelShape,
    *,
    step: Step = WINDOW,
    head_ranks: int = 0,
    plan_by: str = "rows",
    options: Options | None = None,
    price: Price = Planned,
    workers: int = 1,
    watch: Watch = iter,
) -> list[Summary]:
    """The numbers of each method over all steps; the same for any number of workers.

    packs: document lengths of windows, int64 [documents] each, or plans; a last step without all its windows is left
    out. head_ranks: of methods that take the fastest; 0: the one with which all steps together are fastest.
    plan_by: what chooses plans of the strategy `flashcp` once head ranks are chosen, predicted `time` or `rows`.
    options: of strategies, by their name. price: how a plan gets its times.
    watch: hands on the steps' numbers one by one, as a progress bar does; twice where a second look follows.
    Raises ValueError for fewer windows than a step has.
    """
    size = step.windows
    steps = [packs[first : first + size] for first in range(0, len(packs) - size + 1, size)]
    if not steps:
        raise ValueError(f"{len(packs)} windows: expected at least the {size} of a step")
    told: dict[str, Any] = {"ranks": world_size, "setting": setting, "options": options, "price": price}

    def simulated(variants: Iterable[Variant]) -> dict[Variant, Outcome]:
        """Their outcomes, each number an array over steps."""
        once = list(dict.fromkeys(variants))
        if not once:
            return {}
        found = list(watch(map_ordered(partial(_simulate, variants=once, step=step, **told), steps, workers)))
        return {one: Outcome(*np.array([outcomes[one] for outcomes in found]).T) for one in once}

    named = {one.name: one.trials(setting, world_size, step, head_ranks) for one in (VARIANTS[BASELINE], *variants)}

    def mean_ms(one: Variant) -> float:
        return float(np.mean(outcomes[one].module_ms))

    # To make plans by time takes ten times as long: of several head ranks, those far behind get none.
    outcomes = simulated(
        one for trials in named.values() for one in trials if len(trials) > 1 or one == one.planned_by(plan_by)
    )
    for name, trials in named.items():
        near = trials
        if len(trials) > 1:
            limit = NEAR * min(map(mean_ms, trials))
            near = [one for one in trials if mean_ms(one) <= limit]
        named[name] = [one.planned_by(plan_by) for one in near]
    outcomes |= simulated(one for trials in named.values() for one in trials if one not in outcomes)
    best = {name: min(trials, key=mean_ms) for name, trials in named.items()}
    tokens = [pack.offsets[-1] if isinstance(pack, ShardingPlan) else pack.sum() for one in steps for pack in one]
    flops = layer_flops(
        setting.shape, model.ffn_dim, float(np.mean(tokens)) * step.batch_windows / world_size, model.width
    )
    gemm_ms = flops / (1e9 * setting.machine.gemm_tflops)
    base = outcomes[best[BASELINE]]
    return [
        _summarise(best[one.name], outcomes[best[one.name]], base, setting, gemm_ms, model.layers, step)
        for one in variants
    ]


def _simulate(packs: Sequence[Pack], variants: Sequence[Variant], step: Step, **told: Any) -> dict[Variant, Outcome]:
    return simulate_batch(Batch(packs, **told), variants, step)


def _summarise(
    variant: Variant, one: Outcome, base: Outcome, setting: Setting, gemm_ms: float, layers: int, step: Step
) -> Summary:
    """The numbers of one method, of outcomes whose numbers are arrays over steps."""
    means: dict[str, Any] = {
        name: float(np.mean(column)) for name, column in one._asdict().items() if not name.endswith("_mib")
    }
    layer_ms = means["module_ms"] + gemm_ms * means["tokens_imbalance"]
    means["exposed_exchange_ms"] = max(0.0, means["exposed_exchange_ms"])
    module_ms, base_ms = means["module_ms"], float(np.mean(base.module_ms))
    singly = np.asarray(base.module_ms) / one.module_ms
    return Summary(
        *variant[:4],
        overlap=overlap_of(variant, setting),
        data_parallel=variant.data_parallel or step.batch_windows,
        head_ranks=variant.head_ranks,
        gradient_bytes=variant.wire_bytes(setting),
        **means,
        imbalance_max=float(np.max(one.imbalance)),
        module_ms_p50=float(np.percentile(one.module_ms, 50)),
        module_ms_p95=float(np.percentile(one.module_ms, 95)),
        speedup=base_ms / module_ms,
        speedup_p50=float(np.percentile(singly, 50)),
        speedup_p95=float(np.percentile(singly, 95)),
        forward_speedup=float(np.mean(base.forward_ms) / np.mean(one.forward_ms)),
        layer_ms=layer_ms,
        step_ms=layers * layer_ms,
        step_speedup=(base_ms + gemm_ms * float(np.mean(base.tokens_imbalance))) / layer_ms,
        kv_buffer_mib=float(np.max(layers * np.asarray(one.kept_mib) + one.working_mib)),
    )


def overlap_of(variant: Variant, setting: Setting) -> str:
    """What hides transfers: the published rings have their own, our ring no fused kernel, ulysses nothing."""
    if variant.exchange == "ulysses":
        return "none"
    if variant.published:
        return "ring" if variant.exchange == "ring" else "none"
    staged = variant.implementation == "ours" and variant.exchange == "ring" and setting.overlap == "fused"
    return "staged" if staged else setting.overlap


def recommendation(summaries: Sequence[Summary]) -> str:
    """The fastest method that somebody's code runs, what is as fast, what comes next, and best efforts beyond it."""
    runs = [one for one in summaries if one.implementation != "best effort"] or list(summaries)
    best, *others = sorted(runs, key=lambda one: one.module_ms)
    text = f"fastest: {_named(best)}"
    if best.implementation == "ours":
        heads = f" head_ranks={best.head_ranks}" if best.head_ranks > 1 else ""
        text += f" (sharding={best.sharding} exchange={best.exchange} overlap={best.overlap}{heads})"
    text += f", {best.speedup:.2f}x over {BASELINE} as published, {best.step_speedup:.2f}x for a whole step"
    ties = [one for one in others if one.module_ms <= TIE * best.module_ms]
    if ties:
        text += f"; as fast within {TIE - 1:.0%}: {', '.join(map(_named, ties))}"
    rival = next((one for one in others if one not in ties and one.name != BASELINE), None)
    if rival is not None:
        text += f"; {rival.module_ms / best.module_ms:.2f}x over {_named(rival)}, which comes next"
    beyond = min((one for one in summaries if one not in runs), key=lambda one: one.module_ms, default=best)
    if beyond.module_ms * TIE < best.module_ms:
        text += f"; {beyond.name} would be {best.module_ms / beyond.module_ms:.2f}x faster, if somebody's code did it"
    return text


def _named(one: Summary) -> str:
    return one.name + (" as published" if one.implementation == "published" else "")
