"""Routes against a count by hand: one owner and one set of readers per row, written out in full."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashcp
from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.shards import Segments


@st.composite
def plans(draw: st.DrawFn) -> ShardingPlan:
    """Plans no strategy would make: every document cut anywhere, pieces on any rank."""
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
    world_size = draw(st.integers(1, min(6, sum(lengths))))
    if draw(st.booleans()):
        return flashcp.plan(lengths, world_size, draw(st.sampled_from(flashcp.strategies())))
    shards = []
    for document, length in enumerate(lengths):
        cuts = sorted(draw(st.sets(st.integers(1, length), max_size=5)) | {0, length})
        for start, stop in pairwise(cuts):
            shards.append((document, start, stop, draw(st.integers(0, world_size - 1))))
    return ShardingPlan.from_shards(lengths, world_size, shards)


def read_rows(plan: ShardingPlan) -> list[list[set[tuple[int, int]]]]:
    """read[source][reader]: the (document, row) pairs that a reader needs of a source."""
    owner, end = {}, {}
    for document, start, stop, rank in plan.shards:
        owner.update({(document, row): rank for row in range(start, stop)})
        end[document, rank] = max(end.get((document, rank), 0), stop)
    ranks = range(plan.world_size)
    return [
        [
            {(d, x) for (d, x), holder in owner.items() if holder == source != reader and x < end.get((d, reader), 0)}
            for reader in ranks
        ]
        for source in ranks
    ]


def rows_of(segments: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    return [(document, row) for document, start, stop in segments for row in range(start, stop)]


@settings(max_examples=1000)
@given(plans())
def test_exact_sends_each_row_to_its_readers_and_nobody_else(plan: ShardingPlan) -> None:
    route, needed = plan.route("exact"), read_rows(plan)
    for source in range(plan.world_size):
        for reader in range(plan.world_size):
            rows = rows_of(route.segments(source, reader))
            assert len(rows) == len(set(rows))
            assert set(rows) == needed[source][reader]
    sizes = np.array([[len(rows) for rows in row] for row in needed])
    assert route.sent_rows.tolist() == sizes.sum(1).tolist()
    assert route.received_rows.tolist() == sizes.sum(0).tolist()
    assert route.critical_rows == max(sizes.sum(0).max(), sizes.sum(1).max())


@settings(max_examples=800)
@given(plans(), st.sampled_from(["exact", "compacted", "all_gather", "ring"]))
def test_every_exchange_brings_the_rows_that_are_read(plan: ShardingPlan, exchange: str) -> None:
    route, needed = plan.route(exchange), read_rows(plan)
    for reader in range(plan.world_size):
        arriving = route.received(reader)
        rows = arriving.buffer_rows()
        assert len(rows) == len(np.unique(rows))  # no two rows in one place
        assert not (arriving.rank == reader).any()
        for source in range(plan.world_size):
            assert needed[source][reader] <= set(rows_of(route.segments(source, reader)))


@settings(max_examples=500)
@given(plans())
def test_senders_and_readers_agree_on_the_order(plan: ShardingPlan) -> None:
    route = plan.route("exact")
    for source in range(plan.world_size):
        leaving, local = route.sent(source), plan.local(source)
        assert (np.diff(leaving.rank) >= 0).all()
        for reader in range(plan.world_size):
            part = leaving.take(leaving.rank == reader)
            assert list(zip(*(c.tolist() for c in part[:3]), strict=True)) == route.segments(source, reader)
        assert leaving.buffer_rows().tolist() == [local_row(local, *row) for row in rows_of(triples(leaving))]


def triples(segments: Segments) -> list[tuple[int, int, int]]:
    return list(zip(*(column.tolist() for column in segments[:3]), strict=True))


def local_row(local: Segments, document: int, row: int) -> int:
    (i,) = np.flatnonzero((local.document == document) & (local.start <= row) & (row < local.stop))
    return int(local.row[i] + row - local.start[i])


@settings(max_examples=500)
@given(plans())
def test_counts_of_the_other_exchanges(plan: ShardingPlan) -> None:
    ranks, total, tokens = plan.world_size, int(plan.tokens.sum()), plan.tokens
    travelling = np.zeros(ranks, dtype=int)
    for shard in plan.shards:
        travelling[shard.rank] += (shard.stop - shard.start) * (shard.stop < plan.document_lengths[shard.document])
    assert plan.route("compacted").critical_rows == (ranks - 1) * travelling.max()
    assert plan.route("all_gather").critical_rows == (ranks - 1) * tokens.max()
    if ranks > 1:
        assert plan.route("ring").received_rows.tolist() == (total - tokens).tolist()
        assert plan.route("ring").sent_rows.tolist() == [total - tokens[(r + 1) % ranks] for r in range(ranks)]
    ulysses = plan.route("ulysses")
    assert ulysses.sent_rows.sum() == pytest.approx(ulysses.received_rows.sum())
    assert ulysses.sent_rows.sum() == pytest.approx(2 * total * (ranks - 1) / ranks)


def test_savings_and_bytes_by_hand() -> None:
    plan = flashcp.plan([8], 2, "per_document")  # rank 0 holds 0..2 and 6..8, rank 1 holds 2..6
    route = plan.route("exact")
    assert route.sent_rows.tolist() == [2, 4]
    assert route.received_rows.tolist() == [4, 2]
    assert route.segments(1, 0) == [(0, 2, 6)]
    assert route.segments(0, 1) == [(0, 0, 2)]
    assert route.critical_rows == 4
    assert route.saving == 0.0
    assert route.bytes(8, 4, 16, 2).tolist() == [2 * 2 * 4 * 16 * 2, 4 * 2 * 4 * 16 * 2]
    assert route.bytes(8, 4, 16, 4, backward=True).tolist() == [4 * 2 * 4 * 16 * 4, 2 * 2 * 4 * 16 * 4]
    ulysses = plan.route("ulysses")
    assert ulysses.critical_rows == 2 * 4 * 1 / 2
    assert flashcp.plan([8], 2, "contiguous").route("exact").imbalance == 2 * 26 / 36
    assert flashcp.plan([8], 2, "contiguous").route("ulysses").imbalance == 1.0
    # Q, K, V of 4 rows for half the heads, O of 4 rows for half the heads.
    assert ulysses.bytes(8, 4, 16, 2).tolist() == [(4 * (8 + 2 * 4) + 4 * 8) // 2 * 16 * 2] * 2
    # One KV head goes to both.
    assert ulysses.bytes(8, 1, 16, 2).tolist() == [(4 * (4 + 2 * 1) + 4 * 4) * 16 * 2] * 2
    assert ulysses.bytes(8, 1, 16, 2, backward=True).tolist() == [(4 * (4 + 2 * 1) + 4 * 4) * 16 * 2] * 2
    with pytest.raises(ValueError, match="kv_heads=7: cannot be shared out among 2 ranks; expected multiples of 2"):
        ulysses.bytes(7, 7, 16, 2)


@pytest.mark.parametrize("exchange", list(EXCHANGES))
def test_one_rank_alone_sends_nothing(exchange: str) -> None:
    route = flashcp.plan([5, 6], 1).route(exchange)
    assert route.critical_rows == 0
    assert route.saving == 0.0
    assert route.bytes(4, 4, 8, 2).tolist() == [0]


def test_published_saving_is_zero_for_the_all_gather() -> None:
    assert flashcp.plan([4096] * 8, 8).route("all_gather").saving == 0.0
    assert flashcp.plan([4096] * 8, 8).route("ring").saving == 0.0
    assert flashcp.plan([4096] * 8, 8).route("ulysses").saving == pytest.approx(1 - 2 / 8)
