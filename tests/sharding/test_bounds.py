"""Lower bounds: never above what some plan reaches, met where they should be."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashcp.sharding.bounds import certificate, certify, least_largest_work, smallest_end, study_ceiling
from flashcp.sharding.exchanges import rows_of_layers
from flashcp.sharding.masks import Workload, read_workload
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.shards import ShardTable
from flashcp.sharding.strategies import STRATEGIES
from flashcp.sharding.strategies.flashcp import flashcp
from tests.drawn import Pack, cut_anywhere, packs


def every_plan(lengths: list[int], world_size: int, workload: Workload | None = None) -> list[ShardingPlan]:
    """All plans whose ranks differ by at most one row, one row a shard."""
    tokens = sum(lengths)
    document = np.repeat(np.arange(len(lengths)), lengths)
    start = np.concatenate([np.arange(length) for length in lengths])
    plans = []
    for ranks in itertools.product(range(world_size), repeat=tokens):
        counts = np.bincount(ranks, minlength=world_size)
        if counts.max() - counts.min() <= 1:
            table = ShardTable(document, start, start + 1, np.array(ranks))
            plans.append(ShardingPlan(np.array(lengths), world_size, table, workload=workload))
    return plans


@pytest.mark.parametrize(
    ("lengths", "world_size"),
    [
        ([8], 2),
        ([5, 4], 2),
        ([6, 1, 1], 2),
        ([7], 3),
        ([4, 3], 3),
        ([3, 3, 2], 3),
        ([2, 2, 2, 2], 3),
        ([2], 3),
        ([1, 2], 4),
    ],
)
def test_no_plan_at_all_is_below_the_bounds(lengths: list[int], world_size: int) -> None:
    plans = every_plan(lengths, world_size)
    routes = [plan.route("exact") for plan in plans]
    assert least_largest_work(np.array(lengths), world_size) <= min(int(plan.work.max()) for plan in plans)
    for tolerance in (1.0, 1.1, 1.3, 2.0):
        bounds = certificate(np.array(lengths), world_size, tolerance)
        within = [
            (route.critical_rows, int(route.received_rows.sum()))
            for plan, route in zip(plans, routes, strict=True)
            if plan.work.max() <= max(tolerance * plan.work.mean(), bounds.largest_work)
        ]
        assert all(bounds.critical_rows <= critical and bounds.total_rows <= total for critical, total in within)


@given(packs(tokens=8, ranks=3).filter(lambda pack: pack.ranks ** sum(pack.lengths) <= 256), st.floats(1, 2))
def test_no_plan_of_a_tiny_pack_is_below_the_bounds_of_its_masks(pack: Pack, tolerance: float) -> None:
    workload = read_workload(np.array(pack.lengths), pack.masks, pack.layers)
    bounds = certificate(np.array(pack.lengths), pack.ranks, tolerance, workload)
    for plan in every_plan(pack.lengths, pack.ranks, workload):
        assert plan.work.max() >= bounds.largest_work
        if plan.work.max() <= max(tolerance * plan.work.mean(), bounds.largest_work):
            rows = rows_of_layers(plan)
            assert rows.critical >= bounds.critical_rows
            assert rows.received.sum() >= bounds.total_rows


@given(packs().flatmap(lambda pack: cut_anywhere(pack, balanced=True)))
def test_no_plan_that_is_cut_anywhere_is_below_its_bounds(plan: ShardingPlan) -> None:
    assert np.ptp(plan.tokens) <= 1
    assert plan.certificate.gaps is not None
    assert min(plan.certificate.gaps) >= 0


@pytest.mark.parametrize("seed", range(20))
def test_no_strategy_is_below_the_bounds(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = np.maximum(1, 10 ** random.uniform(0, 4, random.integers(1, 30))).astype(np.int64)
    world_size = int(random.integers(2, 12))
    for name, strategy in STRATEGIES.items():
        plan = ShardingPlan(lengths, world_size, strategy(lengths, world_size), name)
        gaps = certify(plan).gaps
        assert gaps is not None
        assert min(gaps) >= 0, name


def test_smallest_end_is_exact() -> None:
    work = np.concatenate((np.arange(2000), [10**15 + i for i in range(-50, 50)]))
    for amount, end in zip(work.tolist(), smallest_end(work).tolist(), strict=True):
        assert end * (end + 1) // 2 >= amount
        assert end == 0 or (end - 1) * end // 2 < amount


@pytest.mark.parametrize("lengths", [[8192], [4096, 4096]])
@pytest.mark.parametrize("world_size", [4, 8])
def test_flashcp_meets_the_bound(lengths: list[int], world_size: int) -> None:
    pack = np.array(lengths)
    plan = ShardingPlan(pack, world_size, flashcp(pack, world_size))
    bound = certify(plan)
    assert bound.reached_critical == bound.critical_rows == max(lengths) - 8192 // world_size


def test_one_row_a_rank_leaves_no_choice() -> None:
    """Rows of work 1 to 6 on six ranks: the largest work is 6, wherever they lie."""
    assert least_largest_work(np.array([6]), 6) == 6
    assert least_largest_work(np.array([6]), 3) == 7  # 1 + 6, 2 + 5, 3 + 4


def test_competing_documents_raise_the_bound() -> None:
    """Nine equal documents on eight ranks: one by one each could stay whole, together one must be cut."""
    lengths = np.full(9, 14_560)
    assert study_ceiling(lengths, 8) == 1.0
    assert certificate(lengths, 8).total_rows > 5000


def test_the_tail_holder_also_sends() -> None:
    """A document of half the window on 8 ranks: who holds its end cannot hold enough of it without sending more."""
    lengths = np.array([65_536] + [512] * 128)
    assert certificate(lengths, 8).critical_rows > 65_536 - 16_384 + 2000


def test_study_ceiling_by_hand() -> None:
    """One document of 16 rows on 2 ranks: 136 pairs, 69.36 a rank at 1.02; e_1 >= 11.06, critical 16 - 8 = 8."""
    assert study_ceiling(np.array([16]), 2) == pytest.approx(0.0)
    assert study_ceiling(np.array([16, 16]), 2) == 1.0
    total = (math.sqrt(1 + 8 * (136 - 1.02 * 172 / 2)) - 1) / 2  # second document: 8 of length 8 -> 36 pairs
    assert study_ceiling(np.array([16, 8]), 2) == pytest.approx(1 - max(16 - 12, total / 2) / 12)
    assert study_ceiling(np.array([5]), 1) == 1.0


def test_a_certificate_prints_its_distances() -> None:
    pack = np.array([8192])
    text = str(certify(ShardingPlan(pack, 4, flashcp(pack, 4))))
    assert "critical rows            6144            6144       1.000" in text
