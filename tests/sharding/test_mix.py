"""Plans for masks and layer mixes: balanced as counted pair by pair, bounds that nothing beats, whole blocks."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flashcp
from flashcp.sharding.bounds import certificate
from flashcp.sharding.exchanges import rows_of_layers
from flashcp.sharding.lengths import windows
from flashcp.sharding.mask import Mask
from flashcp.sharding.masks import read_workload
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.strategies import STRATEGIES
from flashcp.sharding.strategies.flashcp.blocks import cut_blocks, kept_blocks
from flashcp.sharding.strategies.flashcp.density import below, density_of
from flashcp.sharding.strategies.flashcp.members import members
from flashcp.sharding.strategies.flashcp.state import charge, layout, layout_mix, no_holders
from tests.drawn import Pack, packs

GEMMA = [(Mask("causal"), 8), (Mask("window", 1024), 40)]
GPT_OSS = [(Mask("causal"), 18), (Mask("window", 128), 18)]


@given(packs(), st.sampled_from(list(STRATEGIES)))
def test_random_packs_are_covered_balanced_in_tokens_and_above_their_bounds(pack: Pack, strategy: str) -> None:
    plan = pack.plan(strategy)
    held = sorted(row for rank in range(pack.ranks) for row in plan.rows(rank).tolist())
    assert held == list(range(sum(pack.lengths)))
    assert np.ptp(plan.tokens) <= 1
    work = counted_work(pack, plan)
    assert plan.work.tolist() == work.tolist()
    assert plan.imbalance == work.max() * pack.ranks / work.sum()
    assert plan.certificate.gaps is not None
    assert min(plan.certificate.gaps) >= 0
    assert plan == pack.plan(strategy)


def counted_work(pack: Pack, plan: ShardingPlan) -> np.ndarray:
    """Pairs of each rank, counted one by one in every layer."""
    work = np.zeros(pack.ranks, dtype=int)
    for window, chunk, count in pack.kinds:
        pairs = pack.sees(window, chunk).sum(axis=1)
        work += count * np.array([pairs[plan.rows(rank)].sum() for rank in range(pack.ranks)])
    return work


def test_bounds_of_masks_are_not_all_nothing() -> None:
    lengths = np.array([100_000, 31_072])
    causal, gemma = (certificate(lengths, 8, workload=read_workload(lengths, None, mix)) for mix in (None, GEMMA))
    assert 0.5 * 8 * causal.critical_rows < gemma.critical_rows <= 8 * causal.critical_rows
    full = certificate(lengths, 8, workload=read_workload(lengths, Mask("full")))
    assert full.total_rows > 5 * 100_000


@given(packs())
def test_density_counts_what_the_workload_counts(pack: Pack) -> None:
    """Exactly outside blocks, and at their ends; inside, for those that start with the document."""
    lengths = pack.lengths
    workload = read_workload(np.array(lengths), pack.masks, [(Mask("causal"), 2), (Mask("window", 7), 5)])
    order = np.argsort(-np.array(lengths), kind="stable")
    density = density_of(workload, order, 10)
    start, stop = workload.masks.block_start, workload.masks.block_stop
    for at, document in enumerate(order.tolist()):
        for row in range(lengths[document] + 1):
            of = workload.masks.block_document == document
            if not (of & (start > 0) & (start < row) & (row < stop)).any():
                expected = int(workload.pairs_below(np.array([document]), np.array([row]))[0])
                assert below(density, at, row) == expected


@given(st.lists(st.integers(1, 30), min_size=2, max_size=6), st.sampled_from([1, 4]), st.randoms())
def test_full_documents_are_laid_out_as_any_other(rows: list[int], granularity: int, rng: random.Random) -> None:
    length, ranks = sum(rows), len(rows)
    workload = read_workload(np.array([length]), Mask("full"), [(Mask(), 3)])
    density = density_of(workload, np.array([0]), length)
    ours, theirs = (no_holders(np.array([length]), ranks) for _ in range(2))
    for holders in (ours, theirs):
        holders.number[0] = ranks
        holders.rank[:, 0], holders.rows[:, 0] = range(ranks), rows
    ours.work[:, 0] = theirs.work[:, 0] = [3 * length * held + rng.randint(-9, 9) for held in rows]
    layout(ours, 0, 0, granularity, density)
    layout_mix(theirs, 0, 0, granularity, density)
    assert all(map(np.array_equal, ours, theirs))


@pytest.mark.parametrize("mask", [Mask(), Mask("full"), Mask("window", 40), Mask("chunk", 64), Mask("prefix", 30)])
def test_the_search_charges_what_the_routes_count(mask: Mask) -> None:
    """Of one document on four ranks whose pieces are longer than the windows."""
    workload = read_workload(np.array([1000]), mask, [(Mask(), 2), (Mask("window", 20), 3)])
    density = density_of(workload, np.array([0]), 250)
    holders = no_holders(np.array([1000]), 5)
    holders.number[0] = 4
    holders.rank[:4, 0], holders.rows[:4, 0], holders.work[:4, 0] = (
        (2, 0, 3, 1),
        250,
        int(workload.document_pairs[0] / 4),
    )
    layout(holders, 0, 0, 1, density)
    sent, received = np.zeros((2, 4), dtype=np.int64)
    charge(holders, 0, 0, 1, False, density, sent, received)
    assert int(holders.work[:4, 0].sum()) == workload.document_pairs[0]
    shards, low, high = [], 0, 1000
    for slot in range(4):
        rank, tail = int(holders.rank[slot, 0]), int(holders.tail[slot, 0])
        head = 250 - tail
        shards += [(0, low, low + head, rank)] if head else []
        shards += [(0, high - tail, high, rank)] if tail else []
        low, high = low + head, high - tail
    plan = ShardingPlan.from_shards([1000], 4, shards, mask, [(Mask(), 2), (Mask("window", 20), 3)])
    rows = rows_of_layers(plan)
    layers = ((None, 2), (20, 3))
    assert rows.critical == sum(count * plan.route(window=window).critical_rows for window, count in layers)
    assert plan.work[holders.rank[:4, 0]].tolist() == holders.work[:4, 0].tolist()
    assert sent.tolist() == rows.sent.tolist()
    assert received.tolist() == rows.received.tolist()


@pytest.mark.parametrize("layers", [GEMMA, GPT_OSS], ids=["gemma", "gpt_oss"])
@pytest.mark.parametrize("data", ["wlb_llm", "pile", "redpajama"])
@pytest.mark.parametrize("world_size", [8, 64])
def test_a_mix_is_balanced_where_a_causal_plan_is_not(
    data: str, layers: list[tuple[Mask, int]], world_size: int
) -> None:
    for lengths in windows(data, 131_072, 2, seed=11):
        plan = flashcp.plan(lengths, world_size, layers=layers)
        assert np.ptp(plan.tokens) <= 1
        assert plan.imbalance <= 1.01
        causal = flashcp.plan(lengths, world_size)
        same = ShardingPlan(lengths, world_size, causal.table, workload=plan.workload)
        assert plan.imbalance < same.imbalance + 0.0005
        if same.imbalance <= 1.01:  # two searches, neither of which finds the best
            assert rows_of_layers(plan).critical <= 1.15 * rows_of_layers(same).critical


def test_layers_that_are_all_causal_make_the_causal_plan() -> None:
    lengths = next(windows("pile", 131_072, 1, seed=3))
    causal = flashcp.plan(lengths, 8)
    for layers in ([(Mask(), 48)], [(Mask(), 8), (Mask("window", 131_072), 40)]):
        assert all(map(np.array_equal, flashcp.plan(lengths, 8, layers=layers).table, causal.table))


@pytest.mark.parametrize("world_size", [3, 8, 64])
@pytest.mark.parametrize("mask", [Mask("full"), Mask("window", 500), Mask("chunk", 8192), Mask("prefix", 300)])
def test_one_mask_for_all_documents(mask: Mask, world_size: int) -> None:
    lengths = next(windows("wlb_llm", 131_072, 1, seed=4))
    plan = flashcp.plan(lengths, world_size, masks=mask)
    assert np.ptp(plan.tokens) <= 1
    assert plan.imbalance <= 1.01


def test_a_window_is_cut_into_pieces_side_by_side() -> None:
    """All that a cut costs is its halo: nobody should receive much more than two."""
    plan = flashcp.plan([131_072], 8, masks=Mask("window", 1024))
    assert plan.imbalance <= 1.01
    assert plan.route("exact").critical_rows <= 2 * 1023


@pytest.mark.parametrize("layers", [None, [(Mask("causal"), 1), (Mask("window", 256), 5)]], ids=["causal", "mix"])
@pytest.mark.parametrize("world_size", [4, 16])
def test_cuts_spare_blocks_that_fit_on_a_rank(world_size: int, layers: list[tuple[Mask, int]] | None) -> None:
    rng = random.Random(world_size)
    for _ in range(6):
        lengths, masks = [], []
        while sum(lengths) < 60_000:
            blocks, row = [], 0
            for _ in range(rng.randint(0, 30)):
                row += rng.randint(0, 400)
                blocks.append((row, row + 256))
                row += 256
            lengths.append(row + rng.randint(1, 3000))
            masks.append(Mask("causal", blocks=blocks))
        plan = flashcp.plan(lengths, world_size, masks=masks, layers=layers)
        kept = kept_blocks(plan.masks, sum(lengths) // world_size)
        assert kept.all()
        assert cut_blocks(plan.masks, kept, plan.table) == 0
        assert np.ptp(plan.tokens) <= 1
        assert plan.imbalance <= 1.01
        cuts = [cut_blocks(plan.masks, kept, table) for table in members(plan.document_lengths, world_size)]
        assert min(cuts) > 0  # so there was something to spare


def test_blocks_that_leave_no_rows_are_cut_and_ranks_stay_equal() -> None:
    """Whole blocks would leave one rank with 80 rows."""
    plan = flashcp.plan([121], 2, masks=Mask("causal", blocks=[(0, 40), (40, 80), (80, 120)]))
    assert np.ptp(plan.tokens) <= 1
    assert cut_blocks(plan.masks, kept_blocks(plan.masks, 60), plan.table) > 0
