"""The exact solver: right on packs small enough to try every plan, and the measure of `flashcp` on small ones."""

from __future__ import annotations

import numpy as np
import pytest

from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.solver import solve_plan
from flashcp.sharding.strategies.flashcp import flashcp
from tests.sharding.test_bounds import every_plan

pytest.importorskip("ortools")


@pytest.mark.parametrize(("lengths", "world_size"), [([8], 2), ([5, 4], 3), ([6, 1, 1], 2), ([3, 3, 2], 2)])
def test_finds_the_best_of_all_plans(lengths: list[int], world_size: int) -> None:
    tolerance = 1.3
    found = solve_plan(lengths, world_size, granule=1, tolerance=tolerance)
    within = [
        plan
        for plan in every_plan(lengths, world_size)
        if plan.work.max() <= int(tolerance * int(plan.work.sum()) / world_size)
    ]
    assert found.optimal
    assert found.plan.work.max() <= tolerance * found.plan.work.mean()
    assert found.rows == found.plan.route("exact").critical_rows
    assert found.rows == min(plan.route("exact").critical_rows for plan in within)


def test_compacted_counts_rows_that_are_not_last() -> None:
    found = solve_plan([64, 32, 32], 2, granule=8, tolerance=1.1, exchange="compacted")
    assert found.optimal
    assert found.plan.route("compacted").critical_rows == found.rows


def test_granules_that_do_not_divide_leave_slack() -> None:
    plan = solve_plan([100, 31, 7], 3, granule=16, tolerance=1.3, limit_s=5).plan
    assert np.abs(plan.tokens - 46).max() < 16
    inside = plan.table.stop[plan.table.stop != plan.document_lengths[plan.table.document]]
    assert (inside % 16 == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_flashcp_is_near_the_solver(seed: int) -> None:
    """The few-document acceptance in small; the whole of it is in experiments/results/planner_exact.csv."""
    random = np.random.default_rng(seed)
    cuts = np.sort(random.choice(np.arange(1, 16), 2, replace=False))
    lengths = np.diff([0, *cuts, 16]) * 512
    ours = ShardingPlan(lengths, 4, flashcp(lengths, 4, tolerance=1.03))
    found = solve_plan(lengths, 4, granule=256, tolerance=1.03, limit_s=4, hint=ours)
    assert ours.imbalance <= 1.03
    assert ours.route("exact").critical_rows <= 1.1 * found.rows


def test_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="granule=0"):
        solve_plan([8], 2, granule=0)
    with pytest.raises(ValueError, match="exchange='ring'"):
        solve_plan([8], 2, granule=1, exchange="ring")
    with pytest.raises(ValueError, match="no plan found"):
        solve_plan([64], 4, granule=16)
