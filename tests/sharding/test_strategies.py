"""Every strategy, on any pack: rows covered once (the plan checks), ranks equal to a row; and what each promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashcp
from flashcp.sharding.strategies import STRATEGIES

packs = st.one_of(
    st.lists(st.integers(1, 400), min_size=1, max_size=12),
    st.lists(st.integers(1, 3), min_size=1, max_size=300),
    st.tuples(st.integers(1, 5000)).map(list),
    st.lists(st.integers(1, 3), min_size=1, max_size=4),  # fewer rows than ranks
)


@settings(max_examples=1000)
@given(packs, st.integers(1, 24), st.sampled_from(list(STRATEGIES)))
def test_ranks_differ_by_at_most_one_row(lengths: list[int], world_size: int, strategy: str) -> None:
    plan = flashcp.plan(lengths, world_size, strategy)
    assert plan.tokens.max() - plan.tokens.min() <= 1
    assert plan.tokens.sum() == sum(lengths)
    assert plan.work.sum() == sum(n * (n + 1) // 2 for n in lengths)
    assert plan == flashcp.plan(lengths, plan.world_size, strategy)


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize(
    "lengths", [[131_072], [1] * 30_000, [131_000, *[1] * 72], list(range(1, 400))], ids=["full", "tiny", "both", "any"]
)
def test_extreme_windows_on_256_ranks(lengths: list[int], strategy: str) -> None:
    plan = flashcp.plan(lengths, 256, strategy)
    assert plan.tokens.max() - plan.tokens.min() <= 1


def test_contiguous_puts_piece_i_on_rank_i() -> None:
    plan = flashcp.plan([8, 5], 4, "contiguous")
    # The odd row of the second document goes to rank 0, whose turn it is.
    assert list(plan.shards) == [
        (0, 0, 2, 0), (0, 2, 4, 1), (0, 4, 6, 2), (0, 6, 8, 3),
        (1, 0, 2, 0), (1, 2, 3, 1), (1, 3, 4, 2), (1, 4, 5, 3),
    ]  # fmt: skip


def test_per_document_gives_rank_i_chunks_i_and_2n_minus_1_minus_i() -> None:
    plan = flashcp.plan([8], 2, "per_document")
    assert list(plan.shards) == [(0, 0, 2, 0), (0, 2, 6, 1), (0, 6, 8, 0)]
    assert plan.imbalance == 1.0


def test_per_sequence_cuts_the_window_and_ignores_documents() -> None:
    plan = flashcp.plan([3, 5], 2, "per_sequence")
    assert list(plan.shards) == [(0, 0, 2, 0), (0, 2, 3, 1), (1, 0, 3, 1), (1, 3, 5, 0)]


def test_left_over_rows_are_dealt_round_robin() -> None:
    plan = flashcp.plan([1] * 10, 4, "per_document")
    assert plan.table.rank.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_wlb_adaptive_takes_the_faster_of_the_two() -> None:
    one_long = [131_072]
    mixed = [100_000, *[500] * 62]
    short = [64] * 2048
    assert flashcp.plan(one_long, 8, "wlb_adaptive") == flashcp.plan(one_long, 8, "per_sequence")
    assert flashcp.plan(mixed, 8, "wlb_adaptive") == flashcp.plan(mixed, 8, "per_document")
    assert flashcp.plan(short, 8, "wlb_adaptive") == flashcp.plan(short, 8, "per_sequence")


def test_flashcp_paper_keeps_equal_documents_whole() -> None:
    plan = flashcp.plan([8192] * 16, 8, "flashcp_paper")
    assert len(plan.shards) == 16
    assert plan.imbalance == 1.0
    assert plan.route("compacted").critical_rows == 0


def test_flashcp_paper_moves_heads_to_equalise_tokens() -> None:
    plan = flashcp.plan([100, 100, 100, 102], 4, "flashcp_paper", target_imbalance=1.1)
    assert plan.tokens.tolist() == [101, 101, 100, 100]
    assert list(plan.shards)[-2:] == [(3, 0, 1, 1), (3, 1, 102, 0)]
    assert len(plan.shards) == 5


def test_flashcp_paper_meets_its_target_where_cutting_everything_would() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        lengths = rng.lognormal(6, 1.2, 30).astype(int) + 1
        plan = flashcp.plan(lengths, 4, "flashcp_paper")
        assert plan.imbalance <= max(1.05, flashcp.plan(lengths, 4, "per_document").imbalance)


def test_a_tighter_target_cuts_more() -> None:
    lengths = [900, 700, 350, 300, 200, 64, 50, 36]
    loose = flashcp.plan(lengths, 4, "flashcp_paper", target_imbalance=2.0)
    tight = flashcp.plan(lengths, 4, "flashcp_paper", target_imbalance=1.01)
    assert tight.imbalance <= 1.01 < loose.imbalance
    assert tight.route("compacted").critical_rows > loose.route("compacted").critical_rows


def test_flashcp_paper_may_let_tails_leave() -> None:
    plan = flashcp.plan([100, 100, 100, 102], 4, "flashcp_paper", target_imbalance=1.1, leaves="tail")
    assert plan.tokens.tolist() == [101, 101, 100, 100]
    assert list(plan.shards)[-2:] == [(3, 0, 101, 0), (3, 101, 102, 1)]
    heads = flashcp.plan([100, 100, 100, 102], 4, "flashcp_paper", target_imbalance=1.1)
    assert plan.route("compacted").critical_rows == 3 * 101
    assert heads.route("compacted").critical_rows == 3 * 1
    with pytest.raises(ValueError, match="leaves='middle': expected one of head, tail"):
        flashcp.plan([100], 2, "flashcp_paper", leaves="middle")
