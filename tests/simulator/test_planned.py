"""Reads against the route and against a list of every row."""

from __future__ import annotations

import pytest

import flashcp
from flashcp.sharding.exchanges import traffic
from flashcp.sharding.plan import ShardingPlan
from flashcp.simulator.planned import plan_reads
from tests.packs import AWKWARD, random_lengths

PACKS = [*AWKWARD, *(random_lengths(seed) for seed in range(4))]


@pytest.mark.parametrize("strategy", flashcp.strategies())
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_traffic_is_the_exact_route_s(strategy: str, ranks: int) -> None:
    for lengths in PACKS:
        if sum(lengths) >= ranks:
            made = flashcp.plan(lengths, ranks, strategy)
            reads, route = plan_reads(made), made.route("exact")
            assert reads.before.sum(axis=1).tolist() == reads.start.tolist()
            assert traffic(made).sum(axis=1).tolist() == route.sent_rows.tolist()
            assert traffic(made).sum(axis=0).tolist() == route.received_rows.tolist()


def test_reads_of_a_small_plan() -> None:
    made = ShardingPlan.from_shards([10, 4], 2, [(0, 0, 3, 0), (0, 3, 6, 1), (0, 6, 8, 0), (0, 8, 10, 1), (1, 0, 4, 0)])
    reads = plan_reads(made)
    assert reads.rows.tolist() == [3, 3, 2, 2, 4]
    assert reads.before.tolist() == [[0, 0], [3, 0], [3, 3], [5, 3], [0, 0]]
    assert reads.ranges.tolist() == [[0, 0], [1, 0], [1, 1], [2, 1], [0, 0]]
    assert traffic(made).tolist() == [[0, 5], [3, 0]]
