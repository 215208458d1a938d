"""Routes against a count by hand: one owner and one set of readers per row, written out in full."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flashcp
from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.plan import ShardingPlan
from tests.drawn import Pack, cut_anywhere, packs
from tests.sharding.test_masks import pack_rows


@st.composite
def planned(draw: st.DrawFn) -> tuple[Pack, ShardingPlan]:
    """Plans of strategies, and plans no strategy would make."""
    pack = draw(packs())
    strategy = draw(st.none() | st.sampled_from(flashcp.strategies()))
    return pack, draw(cut_anywhere(pack)) if strategy is None else pack.plan(strategy)


@given(planned())
def test_routes_are_those_counted_row_by_row(drawn: tuple[Pack, ShardingPlan]) -> None:
    """Of every exchange, in every kind of layer."""
    pack, plan = drawn
    for window, chunk in {(None, None), *(kind[:2] for kind in pack.kinds)}:
        layer, sees = plan.narrow(window, chunk), pack.sees(window, chunk)
        assert layer.work.tolist() == [int(sees[plan.rows(rank)].sum()) for rank in range(plan.world_size)]
        for exchange in EXCHANGES:
            check_route(layer, exchange, sees)


def check_route(plan: ShardingPlan, exchange: str, sees: np.ndarray) -> None:
    """sees: which row of the pack (second axis) each row sees."""
    route, ranks = plan.route(exchange), range(plan.world_size)
    rows = [plan.rows(rank) for rank in ranks]
    owner = np.empty(len(sees), dtype=int)
    for rank in ranks:
        owner[rows[rank]] = rank
    others = owner[:, None] != np.arange(plan.world_size)  # [row, rank]: whether the rank does not hold the row
    read = others & np.stack([sees[mine].any(axis=0) for mine in rows], axis=1)
    shard = np.repeat(np.arange(len(plan.shards)), plan.table.rows)  # of each row: shards lie in pack order
    leaves = np.isin(shard, shard[read.any(axis=1)]) if exchange == "compacted" else np.full(len(sees), True)
    arrives = {"exact": read, "ulysses": np.ones_like(read)}.get(exchange, others & leaves[:, None])

    for reader in ranks:
        arriving = route.received(reader)
        buffer, found = arriving.buffer_rows(), pack_rows(plan, arriving)
        assert len(np.unique(buffer)) == len(buffer)  # no two rows in one place
        assert sorted(found.tolist()) == np.flatnonzero(arrives[:, reader]).tolist()
        assert owner[found].tolist() == np.repeat(arriving.rank, arriving.stop - arriving.start).tolist()
    for source in ranks:
        leaving = route.sent(source)
        assert rows[source][leaving.buffer_rows()].tolist() == pack_rows(plan, leaving).tolist()
        if exchange != "exact":
            assert pack_rows(plan, leaving).tolist() == np.flatnonzero((owner == source) & leaves).tolist()
            continue
        assert (np.diff(leaving.rank) >= 0).all()
        for reader in ranks:  # in one order at both ends
            part = leaving.take(leaving.rank == reader)
            assert list(zip(*(column.tolist() for column in part[:3]), strict=True)) == route.segments(source, reader)

    tokens, leave = (np.bincount(owner[chosen], minlength=len(ranks)) for chosen in (slice(None), leaves))
    inward, outward = len(sees) - tokens, tokens * (len(ranks) - 1)
    sent, received = {
        "exact": (np.bincount(owner, read.sum(axis=1), len(ranks)), read.sum(axis=0)),
        "ring": (np.roll(inward, -1), inward),
        # Q, K, V and O of a row are half a KV row each, and each other rank has a share of their heads.
        "ulysses": ((3 * outward + inward) / (2 * len(ranks)), (3 * inward + outward) / (2 * len(ranks))),
    }.get(exchange, ((len(ranks) - 1) * np.full(len(ranks), leave.max()),) * 2)  # padded to the longest block
    assert (route.sent_rows == sent).all()
    assert (route.received_rows == received).all()
    assert route.critical_rows == max(sent.max(), received.max())


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
    for heads in ((8, 4, -16, 2), (8, -4, 16, 2), (-8, 4, 16, 2), (8, 4, 16, -2), (8, 4, 2**40, 2**40)):
        with pytest.raises(ValueError, match="expected"):
            route.bytes(*heads)
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


@given(packs(), st.sampled_from(flashcp.strategies()), st.sampled_from(list(EXCHANGES)))
def test_padding_is_no_negative_saving(pack: Pack, strategy: str, exchange: str) -> None:
    """Of 5 rows on 2 ranks an all-gather moves 3, not 2.5."""
    route = pack.plan(strategy).route(exchange)
    assert 0.0 <= route.saving <= 1.0
    assert exchange != "all_gather" or route.saving == 0.0
