"""`flashcp bench planner`: what plans are worth and what they cost, over data sets, world sizes and strategies.

`flashcp bench awkward`: the `flashcp` strategy on windows built to be hard, and against its own portfolio.

`flashcp bench mixes`: what planning for a model's layers is worth, beside the plan that knows causal layers only.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from flashcp.experiments.bench.harness import case_row, rows_table, spread
from flashcp.experiments.cli import bar
from flashcp.experiments.sweep.results import Number, Row, write_rows
from flashcp.sharding.bounds import study_ceiling
from flashcp.sharding.lengths import windows
from flashcp.sharding.mask import Mask
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.route import gathered_rows
from flashcp.sharding.strategies import plan
from flashcp.sharding.strategies.flashcp.members import members
from flashcp.sharding.values import check_choice

MEMBERS_CONTEXT = 16_384  # of the random windows: small, so that thousands are planned in a minute


@dataclass
class PlannerBench:
    """What to measure. seeds: windows of all of them are pooled."""

    data_sets: list[str]
    world_sizes: list[int]
    strategies: list[str]
    context: int
    windows: int
    seeds: list[int]


@dataclass
class AwkwardBench:
    """What to plan. random_windows: compared with the portfolio's members, six kinds of lengths in turn."""

    world_sizes: list[int]
    context: int
    random_windows: int
    seed: int = 7


def bench_planner(bench: PlannerBench) -> Iterator[Row]:
    """Plan every window and yield the numbers of each data set, world size and strategy.

    Milliseconds run from lengths to a validated plan with its route counted, `plan_ms` on the wall and `plan_cpu_ms`
    on this thread (the two differ where others use the machine); the first plan of a case, which loads the compiled
    search, is not among them.
    """
    for data in bench.data_sets:
        packs = [pack for seed in bench.seeds for pack in windows(data, bench.context, bench.windows, seed)]
        for world_size in bench.world_sizes:
            ceilings = np.array([study_ceiling(pack, world_size) for pack in packs])
            for strategy in bench.strategies:
                for number in _numbers(strategy, packs, world_size, ceilings):
                    yield case_row(f"{data} {bench.context // 1024}K N={world_size}", number)


def _numbers(strategy: str, packs: Sequence[np.ndarray], world_size: int, ceilings: np.ndarray) -> Iterator[Number]:
    """Spreads over windows, and means, maxima and shares with p20 and p80 empty."""
    plan(packs[0], world_size, strategy)
    plans, seconds = [], []
    for pack in packs:
        wall, cpu = time.perf_counter(), time.thread_time()
        made = plan(pack, world_size, strategy)
        made.route("exact").critical_rows  # noqa: B018  # counting the rows is part of what is timed
        seconds.append((time.perf_counter() - wall, time.thread_time() - cpu))
        plans.append(made)
    saving = np.array([made.route("exact").saving for made in plans])

    def single(metric: str, unit: str, value: float) -> Number:
        return Number(strategy, metric, unit, None, float(value), None)

    for metric, ms in zip(("plan_ms", "plan_cpu_ms"), 1000 * np.array(seconds).T, strict=True):
        yield Number(strategy, metric, "ms", *spread(ms))
        yield single(f"{metric}_mean", "ms", ms.mean())
        yield single(f"{metric}_p99", "ms", np.percentile(ms, 99))
    yield from _balance(strategy, plans)
    yield Number(strategy, "saving", "share", *spread(saving))
    yield single("saving_mean", "share", saving.mean())
    yield single("ceiling_distance_mean", "points", (100 * (ceilings - saving)).mean())
    yield single("certificate_distance_mean", "points", float(np.mean([*map(_points_to_certificate, plans)])))
    yield single("windows", "windows", len(packs))


def _balance(provider: str, plans: Sequence[ShardingPlan]) -> Iterator[Number]:
    imbalance = np.array([one.imbalance for one in plans])
    yield Number(provider, "imbalance", "max/mean", *spread(imbalance))
    yield Number(provider, "imbalance_max", "max/mean", None, float(imbalance.max()), None)
    yield Number(provider, "windows_over_1.01", "share", None, float((imbalance > 1.01).mean()), None)


def _points_to_certificate(made: ShardingPlan) -> float:
    """How far the saving is below what the certificate leaves possible, in points."""
    gaps = made.certificate.gaps
    assert gaps is not None  # a plan's certificate carries the plan's own numbers
    gathered = gathered_rows(int(made.offsets[-1]), made.world_size)
    return 100 * gaps[1] / gathered if gathered else 0.0


def bench_awkward(bench: AwkwardBench) -> Iterator[Row]:
    """Imbalance and critical rows of each hard window with their proven bounds, then how often a member was better."""
    for world_size in bench.world_sizes:
        for name, lengths in hard_windows(bench.context, world_size, bench.seed).items():
            made = plan(lengths, world_size)
            bounds, case = made.certificate, f"{name} {bench.context // 1024}K N={world_size}"
            for provider, imbalance, rows in (
                ("flashcp", made.imbalance, made.route("exact").critical_rows),
                ("certificate", bounds.largest_work * world_size / int(made.work.sum()), bounds.critical_rows),
            ):
                yield case_row(case, Number(provider, "imbalance", "max/mean", None, imbalance, None))
                yield case_row(case, Number(provider, "critical_rows", "rows", None, rows, None))

    random = np.random.default_rng(bench.seed)
    worse = 0
    packs = itertools.islice(random_windows(random, bench.seed), bench.random_windows)
    for pack in bar(packs, total=bench.random_windows, unit="window"):
        world_size = min(int(random.choice([2, 3, 4, 8, 16])), int(pack.sum()))
        worse += _a_member_is_better(pack, world_size)
    case = f"random windows, six kinds, {bench.random_windows}"
    yield case_row(case, Number("flashcp", "worse_than_a_member", "windows", None, worse, None))


def hard_windows(context: int, world_size: int, seed: int) -> dict[str, list[int]]:
    """Document lengths that planners stumble over, by name."""
    random = np.random.default_rng(seed)

    def tiny(tokens: int) -> list[int]:
        lengths = random.integers(1, 65, tokens // 16 + 64)
        return lengths[np.cumsum(lengths) <= tokens].tolist()

    return {
        "full": [context],
        "two halves": [context // 2] * 2,
        "N+1 equal": [context // (world_size + 1)] * (world_size + 1),
        "2N equal": [context // (2 * world_size)] * (2 * world_size),
        "sixteen": [context // 16] * 16,
        "1 to 64": tiny(context),
        "three quarters and tiny": [3 * context // 4, *tiny(context // 4)],
        "geometric": [max(1, context >> i) for i in range(1, 17)],
        "2 documents": [3 * context // 4, context // 4],
        "3 documents": [context // 2, context // 3, context // 7],
        "4 documents": [context // 2, context // 4, context // 5, context // 21],
        "5 documents": [context // 3, context // 4, context // 5, context // 6, context // 21],
        "6 documents": [context // 6] * 6,
        "30000 documents": random.integers(1, 9, 30_000).tolist(),
    }


def random_windows(random: np.random.Generator, seed: int) -> Iterator[np.ndarray]:
    """Windows without end: the three data sets, tiny documents, equal ones, and lengths over four decades."""
    data = [windows(name, MEMBERS_CONTEXT, 10**6, seed) for name in ("wlb_llm", "pile", "redpajama")]
    while True:
        yield from (next(stream) for stream in data)
        yield random.integers(1, 64, random.integers(10, 800))
        yield np.full(random.integers(1, 40), random.integers(10, 2000))
        yield np.maximum(2, 10 ** random.uniform(0, 4, random.integers(1, 12))).astype(np.int64)


def _a_member_is_better(lengths: np.ndarray, world_size: int) -> bool:
    """Whether a plan of the portfolio has equal or better imbalance and fewer critical rows."""
    made = plan(lengths, world_size)
    rows = made.route("exact").critical_rows
    others = [ShardingPlan(lengths, world_size, table) for table in members(lengths, world_size)]
    return any(o.work.max() <= made.work.max() and o.route("exact").critical_rows < rows for o in others)


def planner_table(rows: list[Row]) -> str:
    """The numbers people ask for first, one line a case and strategy."""
    return rows_table(rows, {"case": "case", "strategy": "provider"}, "planner")


def awkward_table(rows: list[Row]) -> str:
    """One line a window: imbalance and critical rows, each with its proven bound."""
    *hard, last = rows
    told = [replace(row, metric=f"{row.provider} {row.metric}") for row in hard]
    shown = rows_table(told, {"window": "case"}, "awkward")
    return f"{shown}\n{last.case}: a member was better in {last.median:.0f}"


def write_planner_rows(path: Path, rows: list[Row]) -> None:
    """Write the rows as CSV, making the folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path.parent, rows, path.name)


# --- mixes: balance and rows are counted, not timed; the two plans of a window are timed in turns

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
    cases = list(itertools.product(bench.workloads, bench.data_sets, bench.contexts, bench.world_sizes))
    for name, data, context, world_size in bar(cases, unit="case"):
        packs = list(windows(data, context, bench.windows, bench.seed))
        case = f"{name} {data} {context // 1024}K N={world_size}"
        yield from (case_row(case, number) for number in _mix_numbers(name, packs, world_size))


def _mix_numbers(name: str, packs: Sequence[np.ndarray], world_size: int) -> Iterator[Number]:
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
        yield from _balance(provider, plans)
        for mask, _ in layers:
            rows = [one.route("exact", window=mask.size or None).critical_rows for one in plans]
            yield Number(provider, f"critical_rows_{mask.kind}", "rows", *spread(rows))
        yield Number(provider, "plan_cpu_ms", "ms", *spread(1000 * np.array(seconds[provider])))


def mixes_table(rows: list[Row]) -> str:
    """One line a case and plan."""
    return rows_table(rows, {"case": "case", "plan": "provider"}, "mixes")
