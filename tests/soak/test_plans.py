"""Random packs through every strategy: some of them, and that what is wrong with a plan is told."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import flashcp
from flashcp.experiments.sweep.results import read_rows
from flashcp.sharding.plan import ShardingPlan
from tests.soak import plans
from tests.soak.plans import check, main, wrong_with


def test_nothing_is_wrong_with_some_packs() -> None:
    found = [check(number) for number in range(40)]
    assert [one.wrong for one in found] == [[]] * 40
    assert all(one.plans == len(flashcp.strategies()) for one in found)
    assert sum(one.routes for one in found) >= 36  # of every small pack


def test_ranks_with_other_numbers_of_rows_are_told() -> None:
    plan = ShardingPlan.from_shards([5, 3], 2, [(0, 0, 5, 0), (1, 0, 3, 1)])
    assert list(wrong_with(plan)) == ["ranks differ by more than one row"]


def test_a_better_member_is_told() -> None:
    contiguous = flashcp.plan([400], 2, "contiguous")  # per_document: as many rows, equal work
    plan = ShardingPlan(contiguous.document_lengths, 2, contiguous.table, "flashcp")
    assert {line.split(":")[0] for line in wrong_with(plan)} == {"a member is better"}


def test_a_wrong_plan_is_a_row_and_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(plan: ShardingPlan) -> list[str]:
        return ["too heavy"] if plan.strategy == "contiguous" else []

    monkeypatch.setattr(plans, "wrong_with", wrong)
    monkeypatch.setattr(plans, "workers", ThreadPoolExecutor)  # which see it
    assert main(3, tmp_path) == 1
    assert "2 contiguous: too heavy" in capsys.readouterr().out
    found = {row.metric: row.median for row in read_rows(tmp_path)}
    assert found == {"packs": 3, "plans": 18, "routes": found["routes"], "violations": 3}
