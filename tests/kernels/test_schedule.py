"""Schedules: every causal pair of a rank exactly once, from where the rows really lie."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

import flashcp
from flashcp.kernels.schedule import Schedule, build_schedule, whole_pack_schedule
from tests.packs import random_lengths


def pairs(schedule: Schedule, buffers: tuple[list, list], queries: list) -> Counter:
    """How often each ((document, query row), (document, key row)) is computed."""
    count: Counter = Counter()
    for g in range(len(schedule.query_start)):
        rows = queries[schedule.query_start[g] : schedule.query_stop[g]]
        assert rows[0][1] == schedule.query_position[g]
        for r in range(schedule.range_first[g], schedule.range_first[g + 1]):
            keys = buffers[int(schedule.received[r])][schedule.row_start[r] : schedule.row_stop[r]]
            assert keys[0][1] == schedule.position[r]
            for query in rows:
                for key in keys:
                    if not schedule.masked[r] or key[1] <= query[1]:
                        count[query, key] += 1
    return count


@pytest.mark.parametrize("exchange", ["exact", "compacted", "all_gather", "ring"])
@pytest.mark.parametrize("strategy", flashcp.strategies())
def test_every_pair_once_from_where_it_lies(strategy: str, exchange: str) -> None:
    for seed in range(3):
        plan = flashcp.plan(random_lengths(seed), 4, strategy)
        route = plan.route(exchange)
        for rank in range(4):
            local, received = plan.local(rank), route.received(rank)
            own = [(s.document, x) for s in plan.shards if s.rank == rank for x in range(s.start, s.stop)]
            buffer: list = [None] * (int(received.buffer_rows().max(initial=-1)) + 1)
            for document, start, stop, _, row in zip(*(c.tolist() for c in received), strict=True):
                buffer[row : row + stop - start] = [(document, x) for x in range(start, stop)]
            schedule = build_schedule(local, local=local, received=received)
            expected = Counter({((d, x), (d, y)): 1 for d, x in own for y in range(x + 1)})
            assert pairs(schedule, (own, buffer), own) == expected
            assert schedule.pairs == plan.work[rank] == len(expected)
            parts = build_schedule(local, local=local), build_schedule(local, received=received)
            assert sum((pairs(part, (own, buffer), own) for part in parts), Counter()) == expected


def test_sources_are_the_owners_and_local_ranges_come_first() -> None:
    plan = flashcp.plan([64, 64], 4, "per_document")
    schedule = build_schedule(plan.local(2), local=plan.local(2), received=plan.route("exact").received(2))
    assert (schedule.source[~schedule.received] == 2).all()
    assert set(schedule.source[schedule.received].tolist()) == {0, 1, 3}
    for first, stop in pairwise(schedule.range_first):
        assert (np.diff(schedule.received[first:stop].astype(int)) >= 0).all()


def test_parts_hold_the_ranges_asked_for() -> None:
    plan = flashcp.plan([64, 30, 34], 4, "per_document")
    local, received = plan.local(2), plan.route("exact").received(2)
    whole = build_schedule(local, local=local, received=received)
    part = whole.part(whole.received & (whole.source == 1))
    alone = build_schedule(local, received=received.take(received.rank == 1))
    reads = np.diff(part.range_first) > 0
    assert np.array_equal(part.query_start[reads], alone.query_start)
    assert part.row_start.tolist() == alone.row_start.tolist()
    assert part.row_stop.tolist() == alone.row_stop.tolist()
    assert (whole.part(~whole.received).pairs + whole.part(whole.received).pairs) == whole.pairs


def test_a_whole_pack_is_one_masked_range_a_document() -> None:
    schedule = whole_pack_schedule(np.array([3, 1, 4]))
    assert schedule.query_start.tolist() == schedule.row_start.tolist() == [0, 3, 4]
    assert schedule.masked.all()
    assert schedule.pairs == 6 + 1 + 10


def test_size_grows_with_shards_not_tokens() -> None:
    small, large = (flashcp.plan([n] * 4, 4, "per_document") for n in (64, 64_000))
    ranges = [
        build_schedule(plan.local(0), local=plan.local(0), received=plan.route().received(0)).row_start
        for plan in (small, large)
    ]
    assert len(ranges[0]) == len(ranges[1])
