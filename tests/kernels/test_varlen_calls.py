"""The calls of a varlen kernel: every pair of a rank exactly once, and what lies where it is read."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

import flashcp
from flashcp import Mask
from flashcp.kernels.schedule import Schedule, build_schedule, whole_pack_schedule
from flashcp.kernels.varlen.calls import Call, Rows, varlen_calls
from flashcp.sharding.plan import ShardingPlan
from tests.packs import random_lengths

Pairs = set[tuple[int, bool, int]]
"""(query row, key received?, key row)."""


def scheduled(schedule: Schedule) -> Pairs:
    """What a schedule asks for."""
    pairs: Pairs = set()
    for r, query in enumerate(schedule.query):
        for row in range(schedule.query_start[query], schedule.query_stop[query]):
            start, stop = schedule.row_start[r], schedule.row_stop[r]
            position = schedule.query_position[query] + row - schedule.query_start[query]
            before = start - schedule.position[r]
            if schedule.seen is not None:
                document, masks = schedule.seen
                start = max(start, before + int(masks.lowest(document[query], position)))
                stop = min(stop, before + int(masks.past(document[query], position)))
            elif schedule.masked[r]:
                stop = before + position + 1
            pairs |= {(row, bool(schedule.received[r]), key) for key in range(start, stop)}
    return pairs


def computed(calls: list[Call]) -> Counter:
    """How often calls compute each pair."""
    count: Counter = Counter()
    for call in calls:
        queries, keys = call.queries.index.tolist(), call.keys.index.tolist()
        assert len(set(queries)) == len(queries)
        assert (sum(call.query_lengths), sum(call.key_lengths)) == (len(queries), len(keys))
        assert min(*call.query_lengths, *call.key_lengths) > 0
        ends = [np.cumsum(np.append(0, x)).tolist() for x in (call.query_lengths, call.key_lengths)]
        for (a, b), (c, d) in zip(*map(pairwise, ends), strict=True):
            for i in range(a, b):
                lowest = max(c, i - b + d - call.left) if call.left >= 0 else c
                read = keys[lowest : i - b + d + 1 if call.causal else d]
                assert len(read) > 0  # what kernels make of a row that reads nothing differs
                count.update((queries[i], call.received, key) for key in read)
    return count


def schedules(plan: ShardingPlan, exchange: str, rank: int) -> list[Schedule]:
    """All that a rank computes, and the parts of it that overlap `staged` computes one by one."""
    received = plan.route(exchange).received(rank)
    if exchange == "ulysses":
        return [build_schedule(received, local=received, masks=plan.masks)]
    local = plan.local(rank)
    parts = [received.take(received.rank == source) for source in np.unique(received.rank)]
    return [
        build_schedule(local, local=local, received=received, masks=plan.masks),
        build_schedule(local, local=local, masks=plan.masks),
        *(build_schedule(local, received=part, masks=plan.masks) for part in parts),
    ]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("exchange", ["exact", "compacted", "all_gather", "ring", "ulysses"])
@pytest.mark.parametrize("strategy", flashcp.strategies())
def test_every_pair_once(strategy: str, exchange: str, masked: bool) -> None:
    rng = np.random.default_rng(0)
    for seed in range(6 if masked else 2):
        lengths = random_lengths(seed)
        masks = [(Mask(), Mask("window", 1 + 7 * i), Mask("full"))[(i + seed) % 3] for i in range(len(lengths))]
        plan = flashcp.plan(lengths, 3, strategy, masks=masks if masked else None)
        for rank in range(3):
            for schedule in schedules(plan, exchange, rank):
                some = schedule.part(rng.random(len(schedule.source)) < 0.7)
                for each in (schedule, some):
                    assert computed(varlen_calls(each)) == Counter(scheduled(each))


def test_whole_documents_are_one_call_where_they_lie() -> None:
    (call,) = varlen_calls(whole_pack_schedule(np.array([5, 1, 7])))
    assert call.causal
    assert call.queries.as_slice == call.keys.as_slice == slice(0, 13)
    assert call.query_lengths.tolist() == call.key_lengths.tolist() == [5, 1, 7]


def test_own_shards_lie_where_they_are_read_and_only_cut_documents_have_a_prefix() -> None:
    """Rank 1 of two: the end of document 0, whose start it receives, and document 1."""
    plan = ShardingPlan.from_shards([40, 24], 2, [(0, 0, 32, 0), (0, 32, 40, 1), (1, 0, 24, 1)])
    own, prefix = varlen_calls(schedules(plan, "exact", 1)[0])
    assert (own.queries.as_slice, own.keys.as_slice, own.causal, own.received) == (slice(0, 32),) * 2 + (True, False)
    assert own.query_lengths.tolist() == [8, 24]
    assert (prefix.causal, prefix.received) == (False, True)
    assert (prefix.queries.as_slice, prefix.keys.as_slice) == (slice(0, 8), slice(0, 32))


def test_documents_that_arrived_out_of_order_are_put_in_order() -> None:
    plan = flashcp.plan([40, 7, 61], 3, "per_document")
    (call,) = varlen_calls(schedules(plan, "ulysses", 0)[0])
    assert call.causal
    assert sorted(call.query_lengths.tolist()) == [7, 40, 61]
    assert call.queries.as_slice is None


def test_a_document_that_has_a_gap_is_left_to_prefixes() -> None:
    """Shards that read all that is before them, but the one in the middle asks nothing here."""
    plan = flashcp.plan([60], 3, "per_document")
    received = plan.route("ulysses").received(0)
    schedule = build_schedule(received.take(received.start != 10), local=received)
    calls = varlen_calls(schedule)
    assert [call.causal for call in calls] == [True, False]
    assert len(calls[0].query_lengths) == len(schedule.query_start) == 4
    assert computed(calls) == Counter(scheduled(schedule))


def test_rows_that_two_shards_read_take_two_turns() -> None:
    rows = Rows(np.array([4, 0, 4, 9]), np.array([6, 3, 6, 10]))
    assert rows.index.tolist() == [4, 5, 0, 1, 2, 4, 5, 9]
    assert rows.as_slice is None
    first, second = rows.turns
    assert [x.tolist() for x in first if x is not None] == [[0, 1, 2, 3, 4, 7], [4, 5, 0, 1, 2, 9]]
    assert [x.tolist() for x in second if x is not None] == [[5, 6], [4, 5]]
    (only,) = Rows(np.array([4, 0]), np.array([6, 3])).turns
    assert only[0] is None
    assert only[1].tolist() == [4, 5, 0, 1, 2]


def test_windows_are_one_call_where_shards_are_longer_than_they() -> None:
    """Whatever their lengths, a kernel counts from the last row to the last key: the halo's rows alone are read."""
    cuts = [(0, 0, 50, 0), (0, 50, 90, 1), (1, 0, 30, 0), (1, 30, 60, 1)]
    plan = ShardingPlan.from_shards([90, 60], 2, cuts, Mask("window", 8))
    own, halo = varlen_calls(schedules(plan, "exact", 1)[0])
    assert (own.causal, own.left, own.query_lengths.tolist()) == (True, 7, [40, 30])
    assert (halo.causal, halo.left, halo.received) == (False, 0, True)
    assert (halo.query_lengths.tolist(), halo.key_lengths.tolist()) == ([7, 7], [7, 7])
    assert halo.queries.index.tolist() == [*range(7), *range(40, 47)]


def test_nothing_to_read_is_no_call() -> None:
    schedule = whole_pack_schedule(np.array([5, 1, 7]))
    assert varlen_calls(schedule.part(np.zeros(3, bool))) == []
