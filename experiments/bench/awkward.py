"""`flashcp bench awkward`: the `flashcp` strategy on windows built to be hard, and against its own portfolio."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from flashcp.experiments.bench.planner import planner_row
from flashcp.experiments.progress import bar
from flashcp.experiments.sweep.results import Number, Row
from flashcp.sharding.lengths import windows
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.strategies import plan
from flashcp.sharding.strategies.flashcp.members import members

__all__ = ["AwkwardBench", "awkward_table", "bench_awkward", "hard_windows", "random_windows"]

MEMBERS_CONTEXT = 16_384  # of the random windows: small, so that thousands are planned in a minute


@dataclass
class AwkwardBench:
    """What to plan. random_windows: compared with the portfolio's members, six kinds of lengths in turn."""

    world_sizes: list[int] = field(default_factory=lambda: [1, 3, 4, 7, 8, 16, 48, 256])
    context: int = 131_072
    random_windows: int = 2000
    seed: int = 7


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
                yield planner_row(case, Number(provider, "imbalance", "max/mean", None, imbalance, None))
                yield planner_row(case, Number(provider, "critical_rows", "rows", None, rows, None))

    random = np.random.default_rng(bench.seed)
    worse = 0
    packs = itertools.islice(random_windows(random, bench.seed), bench.random_windows)
    for lengths in bar(packs, total=bench.random_windows, unit="window"):
        world_size = min(int(random.choice([2, 3, 4, 8, 16])), int(lengths.sum()))
        worse += _a_member_is_better(lengths, world_size)
    case = f"random windows, six kinds, {bench.random_windows}"
    yield planner_row(case, Number("flashcp", "worse_than_a_member", "windows", None, worse, None))


def hard_windows(context: int, world_size: int, seed: int) -> dict[str, np.ndarray]:
    """Document lengths that planners stumble over, by name, int64 each."""
    random = np.random.default_rng(seed)

    def tiny(tokens: int) -> list[int]:
        lengths = random.integers(1, 65, tokens // 16 + 64)
        return lengths[np.cumsum(lengths) <= tokens].tolist()

    return {
        name: np.array(lengths, dtype=np.int64)
        for name, lengths in {
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
        }.items()
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


def awkward_table(rows: list[Row]) -> str:
    """One line a window: imbalance and critical rows, each with its proven bound."""
    values = {(row.case, row.provider, row.metric): row.median for row in rows}
    lines = [f"{'window':<36}{'imbalance':>10}{'bound':>10}{'critical rows':>16}{'bound':>10}"]
    for case in dict.fromkeys(row.case for row in rows[:-1]):
        lines.append(
            f"{case:<36}{values[case, 'flashcp', 'imbalance']:>10.4f}{values[case, 'certificate', 'imbalance']:>10.4f}"
            f"{values[case, 'flashcp', 'critical_rows']:>16.0f}{values[case, 'certificate', 'critical_rows']:>10.0f}"
        )
    return "\n".join([*lines, f"{rows[-1].case}: a member was better in {rows[-1].median:.0f}"])
