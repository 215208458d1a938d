"""`flashcp bench mixes`: what planning for a model's layers is worth, beside the plan that knows causal layers only.

Balance and rows are counted, not timed; the two plans of a window are timed in turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from flashcp.experiments.bench.harness import rows_table, spread
from flashcp.experiments.bench.planner import case_row
from flashcp.experiments.progress import bar
from flashcp.experiments.sweep.results import Number, Row
from flashcp.sharding.lengths import windows
from flashcp.sharding.mask import Mask
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.strategies import plan
from flashcp.sharding.values import check_choice

# Documents' masks and layer mix, as `flashcp.plan` takes them: 62 layers of Gemma 3 27B, 36 of gpt-oss 120B, one of an
# encoder.
WORKLOADS = {
    "gemma3": (Mask("causal"), [(Mask("causal"), 10), (Mask("window", 1024), 52)]),
    "gpt_oss": (Mask("causal"), [(Mask("causal"), 18), (Mask("window", 128), 18)]),
    "full": (Mask("full"), [(Mask("causal"), 1)]),
}


@dataclass
class MixesBench:
    """What to plan. windows: for each data set, context and world size."""

    workloads: list[str]
    data_sets: list[str]
    contexts: list[int]
    world_sizes: list[int]
    windows: int
    seed: int = 5


def bench_mixes(bench: MixesBench) -> Iterator[Row]:
    """Imbalance of the sum over all layers, critical rows of a layer of each kind, and milliseconds."""
    for name in bench.workloads:
        check_choice("workloads", name, WORKLOADS)
    cases = [
        (name, data, context, world_size)
        for name in bench.workloads
        for data in bench.data_sets
        for context in bench.contexts
        for world_size in bench.world_sizes
    ]
    for name, data, context, world_size in bar(cases, total=len(cases), unit="case"):
        packs = list(windows(data, context, bench.windows, bench.seed))
        case = f"{name} {data} {context // 1024}K N={world_size}"
        yield from (case_row(case, number) for number in _numbers(name, packs, world_size))


def _numbers(name: str, packs: Sequence[np.ndarray], world_size: int) -> Iterator[Number]:
    masks, layers = WORKLOADS[name]
    planners: dict[str, Callable[[np.ndarray], ShardingPlan]] = {
        "flashcp": lambda pack: plan(pack, world_size, masks=masks, layers=layers),
        "flashcp_causal": lambda pack: plan(pack, world_size),
    }
    made: dict[str, list[ShardingPlan]] = {provider: [] for provider in planners}
    seconds: dict[str, list[float]] = {provider: [] for provider in planners}
    for planner in planners.values():
        planner(packs[0])  # compiles
    for pack in packs:
        for provider, planner in planners.items():
            started = time.thread_time()
            found = planner(pack)
            seconds[provider].append(time.thread_time() - started)
            made[provider].append(ShardingPlan.from_shards(pack, world_size, found.shards, masks, layers))
    for provider, plans in made.items():
        imbalance = np.array([one.imbalance for one in plans])
        yield Number(provider, "imbalance", "max/mean", *spread(imbalance))
        yield Number(provider, "imbalance_max", "max/mean", None, float(imbalance.max()), None)
        yield Number(provider, "windows_over_1.01", "share", None, float((imbalance > 1.01).mean()), None)
        for mask, _ in layers:
            rows = [one.route("exact", window=mask.size or None).critical_rows for one in plans]
            yield Number(provider, f"critical_rows_{mask.kind}", "rows", *spread(rows))
        yield Number(provider, "plan_cpu_ms", "ms", *spread(1000 * np.array(seconds[provider])))


def mixes_table(rows: list[Row]) -> str:
    """One line a case and plan."""
    return rows_table(rows, {"case": "case", "plan": "provider"}, "mixes")
