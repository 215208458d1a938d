"""Whole batches: which replica gets which windows, and who waits for whom."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import flashcp
from flashcp.clusters import read_cluster
from flashcp.sharding.lengths import windows
from flashcp.simulator.pack import Batch, place, simulate_batch
from flashcp.simulator.planned import Setting
from flashcp.simulator.variants import VARIANTS, WINDOW, Step

SETTING = Setting(read_cluster("h100-nvlink"))
PACKS = list(windows("pile", 16_384, 12, 3))
LLAMA3, WLB, OURS = VARIANTS["llama3"], VARIANTS["wlb_adaptive"], VARIANTS["flashcp"]._replace(head_ranks=1)


def test_where_windows_go() -> None:
    work = np.array([1.0, 9, 2, 8, 3, 7])
    step = Step(2, 3)
    assert place(work, LLAMA3, step).tolist() == [[[0], [1]], [[2], [3]], [[4], [5]]]
    assert place(work, OURS, step).tolist() == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert place(work, WLB, step).tolist() == [[[1], [3]], [[5], [4]], [[2], [0]]]
    by_step = place(work, WLB, Step(2, 3, "step"))
    assert sorted(by_step.ravel().tolist()) == list(range(6))
    assert work[by_step].sum(axis=(0, 2)).tolist() == [14, 16]  # 9 + 3 + 2, 8 + 7 + 1
    assert place(np.ones(4), OURS._replace(data_parallel=2), Step(4)).tolist() == [[[0, 1], [2, 3]]]


@pytest.mark.parametrize("waits", ["micro_batch", "step"])
def test_a_job_waits_for_its_slowest_replica(waits: str) -> None:
    """By hand from windows simulated one by one, on the ranks of a replica."""
    step, ranks = Step(4, 3, waits), 16
    for variant in (LLAMA3, VARIANTS["per_document_best_effort"], OURS._replace(data_parallel=4)):
        alone = [simulate_batch(Batch([pack], 4, SETTING), [variant._replace(data_parallel=1)]) for pack in PACKS]
        ms = np.array([next(iter(one.values())).module_ms for one in alone]).reshape(3, 4)
        expected = ms.max(axis=1).mean() if waits == "micro_batch" else ms.mean(axis=0).max()
        found = simulate_batch(Batch(PACKS, ranks, SETTING), [variant], step)[variant]
        assert found.module_ms == pytest.approx(expected)
        assert found.attention_ms + found.copies_ms + found.exposed_exchange_ms == pytest.approx(found.module_ms)
        work = np.array([(pack * (pack + 1.0)).sum() / 2 for pack in PACKS]).reshape(3, 4)
        each = np.array([next(iter(one.values())).imbalance for one in alone]).reshape(3, 4)
        assert found.imbalance == pytest.approx(((each * work).max(axis=1) / work.mean(axis=1)).mean())


def test_one_plan_is_that_of_all_windows_behind_one_another() -> None:
    batch = Batch(PACKS[:4], 16, SETTING)
    expected = simulate_batch(Batch([np.concatenate(PACKS[:4])], 16, SETTING), [OURS])
    assert simulate_batch(batch, [OURS], Step(4)) == expected
    assert batch.planned(OURS, (0, 1, 2, 3)).plan == flashcp.plan(np.concatenate(PACKS[:4]), 16)


def test_windows_dealt_by_work_are_as_good_as_any_deal() -> None:
    """Against every deal of six windows to two replicas, by the work each replica has."""
    work = np.array([(pack * (pack + 1.0)).sum() for pack in PACKS[:6]])
    alike = work[place(work, WLB, Step(2, 3))].sum(axis=2)
    deals = [np.array(order).reshape(3, 2) for order in itertools.permutations(range(6))]
    assert alike.max(axis=1).sum() == pytest.approx(min(work[deal].max(axis=1).sum() for deal in deals))
    dealt = work[place(work, WLB, Step(2, 3, "step"))].sum(axis=(0, 2)).max()
    assert dealt <= 4 / 3 * min(work[deal].sum(axis=0).max() for deal in deals)  # what heaviest first promises


def test_who_waits_less_is_no_slower() -> None:
    names = ["llama3", "wlb_adaptive", "per_document_best_effort", "flashcp"]
    often, once = (
        flashcp.simulate(PACKS, 16, methods=names, batch_windows=4, micro_batches=3, waits=waits)
        for waits in ("micro_batch", "step")
    )
    for name in names:
        assert once[name].module_ms <= often[name].module_ms * (1 + 1e-12), name
    assert once["flashcp"].module_ms == often["flashcp"].module_ms
    assert often["llama3"].data_parallel == 4
    assert often["flashcp"].data_parallel == 1


def test_one_plan_wins_what_replicas_lose_by_waiting() -> None:
    table = flashcp.simulate(PACKS, 16, batch_windows=4, methods=["flashcp", "flashcp:d2:h1", "flashcp:d4:h1"])
    ms = [one.module_ms for one in table]
    assert ms == sorted(ms)
    assert [one.data_parallel for one in table] == [1, 2, 4]
    assert table["flashcp"].imbalance < 1.02 < 1.3 < table["flashcp:d4:h1"].imbalance
    assert str(table).startswith("12 windows in batches of 4, 16 ranks; simulated on h100-nvlink")


def test_a_batch_of_one_window_is_that_window() -> None:
    assert flashcp.simulate(PACKS[:2], 4, batch_windows=1).methods == flashcp.simulate(PACKS[:2], 4).methods
    assert VARIANTS["llama3"].trials(SETTING, 4, WINDOW) == [LLAMA3]


def test_windows_that_make_no_whole_step_are_left_out() -> None:
    five, four = (flashcp.simulate(PACKS[:count], 8, batch_windows=2, micro_batches=2) for count in (5, 4))
    assert five.methods == four.methods
    with pytest.raises(ValueError, match=r"^3 windows: expected at least the 4 of a step$"):
        flashcp.simulate(PACKS[:3], 8, batch_windows=2, micro_batches=2)
    with pytest.raises(ValueError, match=r"^batch_windows=2 with plans: expected 1, a plan holds its whole batch$"):
        flashcp.simulate(flashcp.plan(PACKS[0], 4), batch_windows=2)
