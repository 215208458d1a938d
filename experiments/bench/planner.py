"""`flashcp bench planner`: what plans are worth and what they cost, over data sets, world sizes and strategies.

Rows are long: one number each, written to experiments/results/planner.csv with what a number must carry.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from flashcp.experiments.provenance import commit
from flashcp.experiments.sweep.results import Number, Row, to_row, write_rows
from flashcp.sharding.bounds import study_ceiling
from flashcp.sharding.lengths import LENGTH_DATA, windows
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.strategies import plan, strategies

__all__ = ["PlannerBench", "bench_planner", "planner_row", "planner_table", "provenance", "write_planner_rows"]


@dataclass
class PlannerBench:
    """What to measure. seeds: windows of all of them are pooled."""

    data_sets: list[str] = field(default_factory=lambda: list(LENGTH_DATA))
    world_sizes: list[int] = field(default_factory=lambda: [4, 8, 16, 32])
    strategies: list[str] = field(default_factory=lambda: list(strategies()))
    context: int = 131_072
    windows: int = 100
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])


def bench_planner(bench: PlannerBench) -> Iterator[Row]:
    """Plan every window and yield the numbers of each data set, world size and strategy.

    Milliseconds run from lengths to a validated plan with its route counted, `plan_ms` on the wall and `plan_cpu_ms`
    on this thread (the two differ where others use the machine); the first plan of a case, which loads the compiled
    search, is not among them.
    """
    for data in bench.data_sets:
        packs = [pack for seed in bench.seeds for pack in windows(data, bench.context, bench.windows, seed)]
        for world_size in bench.world_sizes:
            ceilings = [study_ceiling(pack, world_size) for pack in packs]
            for strategy in bench.strategies:
                case = f"{data} {bench.context // 1024}K N={world_size}"
                yield from _numbers(case, strategy, packs, world_size, ceilings)


def _numbers(
    case: str, strategy: str, packs: list[np.ndarray], world_size: int, ceilings: list[float]
) -> Iterator[Row]:
    plan(packs[0], world_size, strategy)
    plans, wall_ms, cpu_ms = [], [], []
    for pack in packs:
        wall, cpu = time.perf_counter(), time.thread_time()
        made = plan(pack, world_size, strategy)
        made.route("exact").critical_rows  # noqa: B018  # counting the rows is part of what is timed
        wall_ms.append(1000 * (time.perf_counter() - wall))
        cpu_ms.append(1000 * (time.thread_time() - cpu))
        plans.append(made)
    imbalance = np.array([made.imbalance for made in plans])
    saving = np.array([made.route("exact").saving for made in plans])
    to_ceiling = 100 * (np.array(ceilings) - saving)
    to_certificate = np.array([_points_to_certificate(made) for made in plans])

    def spread(metric: str, unit: str, values: np.ndarray | list[float]) -> Row:
        return planner_row(case, Number(strategy, metric, unit, *np.percentile(values, (20, 50, 80)).tolist()))

    def single(metric: str, unit: str, value: float | np.floating[Any]) -> Row:
        return planner_row(case, Number(strategy, metric, unit, None, float(value), None))

    for metric, times in (("plan_ms", wall_ms), ("plan_cpu_ms", cpu_ms)):
        yield spread(metric, "ms", times)
        yield single(f"{metric}_mean", "ms", float(np.mean(times)))
        yield single(f"{metric}_p99", "ms", float(np.percentile(times, 99)))
    yield spread("imbalance", "max/mean", imbalance)
    yield single("imbalance_max", "max/mean", imbalance.max())
    yield single("windows_over_1.01", "share", float((imbalance > 1.01).mean()))
    yield spread("saving", "share", saving)
    yield single("saving_mean", "share", saving.mean())
    yield single("ceiling_distance_mean", "points", to_ceiling.mean())
    yield single("certificate_distance_mean", "points", to_certificate.mean())
    yield single("windows", "windows", len(packs))


def _points_to_certificate(made: ShardingPlan) -> float:
    """How far the saving is below what the certificate leaves possible, in points."""
    gaps = made.certificate.gaps
    assert gaps is not None  # a plan's certificate carries the plan's own numbers
    gathered = int(made.offsets[-1]) * (made.world_size - 1)
    return 100 * gaps[1] * made.world_size / gathered if gathered else 0.0


def planner_table(rows: list[Row]) -> str:
    """The numbers people ask for first, one line a case and strategy."""
    shown = (
        ("imbalance_max", "imbalance max", ".4f"),
        ("saving_mean", "saving", ".3f"),
        ("ceiling_distance_mean", "to ceiling", ".2f"),
        ("certificate_distance_mean", "to certificate", ".2f"),
        ("plan_ms_mean", "ms mean", ".1f"),
        ("plan_ms_p99", "ms p99", ".1f"),
        ("plan_cpu_ms_mean", "CPU ms mean", ".1f"),
        ("plan_cpu_ms_p99", "CPU ms p99", ".1f"),
    )
    values = {(row.case, row.provider, row.metric): row.median for row in rows}
    lines = [f"{'case':<24}{'strategy':<16}" + "".join(f"{title:>15}" for _, title, _ in shown)]
    for case, provider in dict.fromkeys((row.case, row.provider) for row in rows):
        numbers = "".join(f"{format(values[case, provider, metric], style):>15}" for metric, _, style in shown)
        lines.append(f"{case:<24}{provider:<16}{numbers}")
    return "\n".join(lines)


def write_planner_rows(path: Path, rows: list[Row]) -> None:
    """Write the rows as CSV, making the folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path.parent, rows, path.name)


def planner_row(case: str, number: Number) -> Row:
    """A number of a plan, with what it must carry. median: over windows, or the number itself (mean, maximum, share)
    with p20 and p80 empty."""
    return to_row(case, number, platform_text(), of_versions=_versions())


def provenance() -> tuple[str, str, str, str]:
    """What every row carries: device, versions, commit, date."""
    return platform_text(), _versions(), commit(), datetime.date.today().isoformat()


def platform_text() -> str:
    """The device of a host-only measurement: how many cores, of what."""
    return f"{os.cpu_count()}-core CPU ({platform.machine()})"


def _versions() -> str:
    import flashcp

    numba = f"numba {version('numba')}" if find_spec("numba") else "no numba"
    return f"flashcp {flashcp.__version__}, numpy {np.__version__}, {numba}, python {platform.python_version()}"
