"""Random packs through every strategy: is any plan or route wrong, does any plan break a bound?

    python -m tests.soak.plans 200000 FOLDER          (`make plans`)

Nine packs of ten have up to 120 rows, any masks and layer mixes: work is compared with a dense matrix of what each row
sees, and of one strategy the rows that travel under one exchange, row by row, and the bounds. The tenth has some
thousand rows, 100,000 at most, of ten kinds of lengths. A pack is its number: `check(number)` says what is wrong with
it. Exit code 1 where anything is.
"""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import flashcp
from flashcp.experiments.sweep.results import Number, to_row, write_rows
from flashcp.sharding.documents import expand_ranges
from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.mask import Mask
from flashcp.sharding.plan import ShardingPlan
from tests.drawn import Pack, fitting
from tests.sharding.test_flashcp import KINDS, better_members
from tests.sharding.test_masks import random_mask
from tests.sharding.test_route import check_route

ROWS, RANKS = 120, 6
BIG_RANKS = (2, 3, 4, 8)
ONE_IN = 10  # packs is a big one
AT_ONCE = 200  # packs of a task


class Found(NamedTuple):
    """plans, routes: how many were checked. wrong: what each failure was, with the pack's number."""

    plans: int
    routes: int
    wrong: list[str]


def small_pack(draw: random.Random) -> Pack:
    most = draw.choice((3, ROWS // 6, ROWS))
    lengths = [draw.randint(1, most) for _ in range(draw.randint(1, 6))]
    while sum(lengths) > ROWS:
        lengths.pop()
    lengths = lengths or [draw.randint(1, ROWS)]
    kind = draw.randrange(3)
    masks = [random_mask(draw, rows) for rows in lengths] if kind == 2 else Mask()
    sizes = {mask.size for mask in masks if mask.kind == "chunk"} if kind == 2 else set()
    any_of = [Mask(), Mask("window", draw.randint(1, 45)), Mask("chunk", draw.choice(fitting(sizes)))]
    layers = [(draw.choice(any_of), draw.randint(1, 50)) for _ in range(draw.randint(1, 3))] if kind else None
    return Pack(lengths, masks, layers, draw.randint(1, min(RANKS, sum(lengths))))


def check(number: int) -> Found:
    """What is wrong with a pack's plans."""
    draw = random.Random(number)
    big = number % ONE_IN == 0
    if big:
        rng = np.random.default_rng(number)
        lengths = KINDS[draw.choice(list(KINDS))](rng)
        pack = Pack(lengths.tolist(), Mask(), None, draw.choice(BIG_RANKS))
    else:
        pack = small_pack(draw)
    kinds = [] if big else [kind[:2] for kind in pack.kinds]
    seen = {kind: pack.sees(*kind) for kind in kinds}
    strategies = flashcp.strategies()
    looked_at, exchange = draw.choice(strategies), draw.choice(list(EXCHANGES))
    routes, wrong = 0, []
    for strategy in strategies:
        try:
            plan = flashcp.plan(pack.lengths, pack.ranks, strategy) if big else pack.plan(strategy)
            wrong += [f"{number} {strategy}: {one}" for one in wrong_with(plan)]
            for kind, sees in seen.items():
                layer = plan.narrow(*kind)
                assert layer.work.tolist() == [int(sees[plan.rows(rank)].sum()) for rank in range(plan.world_size)]
                if strategy == looked_at:
                    check_route(layer, exchange, sees)
                    routes += 1
            if strategy == looked_at and plan.certificate.gaps is not None and min(plan.certificate.gaps) < 0:
                wrong.append(f"{number} {strategy}: below a bound that is proven: {plan.certificate.gaps}")
        except Exception as error:
            wrong.append(f"{number} {strategy}: {type(error).__name__}: {str(error)[:200]}")
    return Found(len(strategies), routes, wrong)


def wrong_with(plan: ShardingPlan) -> Iterator[str]:
    """Of any plan: rows covered once, ranks equal to a row, the same after JSON, no member of `flashcp` better."""
    rows = expand_ranges(plan.offsets[plan.table.document] + plan.table.start, plan.table.rows)
    if not np.array_equal(np.sort(rows), np.arange(plan.offsets[-1])):
        yield "rows are not covered once"
    if np.ptp(np.bincount(plan.table.rank, plan.table.rows, plan.world_size)) > 1:
        yield "ranks differ by more than one row"
    if ShardingPlan.from_json(plan.to_json()) != plan:
        yield "another plan after JSON"
    if plan.strategy == "flashcp" and plan.workload.is_causal:
        yield from (f"a member is better: {other}" for other in better_members(plan))


def check_some(numbers: range) -> Found:
    plans, routes, wrong = zip(*map(check, numbers), strict=True)
    return Found(sum(plans), sum(routes), list(chain.from_iterable(wrong)))


def workers() -> Executor:
    return ProcessPoolExecutor(mp_context=get_context("spawn"))


def main(count: int, folder: Path) -> int:
    """Exit code: 1 where something is wrong."""
    tasks = [range(first, min(first + AT_ONCE, count)) for first in range(0, count, AT_ONCE)]
    total: Counter[str] = Counter()
    wrong: list[str] = []
    with workers() as pool, tqdm(total=count, unit="pack") as bar:
        for numbers, found in zip(tasks, pool.map(check_some, tasks), strict=True):
            total.update(packs=len(numbers), plans=found.plans, routes=found.routes, violations=len(found.wrong))
            wrong += found.wrong
            bar.update(len(numbers))
            bar.set_postfix(wrong=len(wrong))
    folder.mkdir(parents=True, exist_ok=True)
    case = f"{len(flashcp.strategies())} strategies, packs of up to {ROWS} rows, every tenth of up to 100,000"
    rows = [Number("plans", name, "1", None, total[name], None) for name in ("packs", "plans", "routes", "violations")]
    write_rows(folder, [to_row(case, row, f"CPU, {os.cpu_count()} cores") for row in rows])
    print(", ".join(f"{row.median:,} {row.metric}" for row in rows))
    print("\n".join(wrong[:20]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2])))
