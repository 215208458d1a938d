"""Published ways to place a batch, by hand on small batches and against what their papers promise."""

from __future__ import annotations

import numpy as np
import pytest

import flashcp
from flashcp.sharding.lengths import windows
from flashcp.simulator.rivals import RIVALS, dynamic_cp, flexible_cp, in_groups

BATCH = np.concatenate(list(windows("wlb_llm", 32_768, 4, 7)))


def test_a_group_takes_two_chunks_each_from_either_end() -> None:
    plan = in_groups(np.array([8, 3, 1]), 4, np.array([1, 0, 3]), np.array([2, 1, 1]))
    assert list(map(tuple, plan.shards)) == [(0, 0, 2, 1), (0, 2, 6, 2), (0, 6, 8, 1), (1, 0, 3, 0), (2, 0, 1, 3)]


def test_dynamic_groups_are_powers_of_two_as_large_as_their_longest_document_asks_for() -> None:
    """16 rows and 200 pairs a rank: 33 rows (561 pairs) and 31 (496) ask for 2.8 and 2.5 ranks, so for 4 each."""
    plan = dynamic_cp(np.array([33, 31, 16, 16, 16, 16]), 8)
    ranks = [np.unique(plan.table.rank[plan.table.document == document]).tolist() for document in range(6)]
    assert ranks[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all(len(some) == 1 for some in ranks[2:])


def test_flexible_groups_are_of_the_size_that_takes_least_time() -> None:
    """Work 9:4:1 (lengths 3:2:1, large) on 7 ranks: 4, 2 and 1 ranks leave 2.25 at most, no other sizes less."""
    lengths = np.array([2000, 3000, 1000])
    plan = flexible_cp(lengths, 7)
    sizes = [len(np.unique(plan.table.rank[plan.table.document == document])) for document in range(3)]
    assert sizes == [2, 4, 1]
    assert plan.work.max() == pytest.approx(3000**2 / 2 / 4, rel=0.01)


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("ranks", [1, 3, 8, 16, 24])
def test_every_row_is_somewhere_and_work_is_nearly_even(name: str, ranks: int) -> None:
    plan = RIVALS[name](BATCH, ranks)  # a plan checks that every row lies on one rank
    assert plan.world_size == ranks
    assert plan.imbalance < {"dynamic_cp": 1.8, "flexible_cp": 1.4}[name]


def test_they_plan_the_batch_and_place_rows_alone() -> None:
    packs = list(windows("wlb_llm", 32_768, 8, 7))
    names = [f"{name}_best_effort" for name in (*RIVALS, "block_placement")]
    table = flashcp.simulate(packs, 16, kv_heads=8, batch_windows=4, methods=[*names, "flashcp", "flashcp:h1:w2"])
    for name in names:
        assert (table[name].data_parallel, table[name].head_ranks, table[name].gradient_bytes) == (1, 1, 2)
    assert table["block_placement_best_effort"].module_ms <= table["flashcp:h1:w2"].module_ms
    assert table["flexible_cp_best_effort"].tokens_imbalance > 1.2 > table["flashcp"].tokens_imbalance
