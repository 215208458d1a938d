"""Random windows against their members' predicted times: some of them, and that a slower plan is told."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flashcp.experiments.sweep.results import read_rows
from tests.soak import timed
from tests.soak.timed import check, main

strategy = importlib.import_module("flashcp.sharding.strategies.flashcp")


def test_no_member_is_faster_in_some_windows() -> None:
    found = [check(number) for number in range(30)]
    assert [wrong for *_, wrong in found] == [""] * 30
    assert max(ours for ours, _, _ in found) <= 1.001
    assert max(by_rows for _, by_rows, _ in found) > 1.05


def test_a_slower_plan_is_a_row_and_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(strategy, "CLEARLY", 10.0)  # nothing is faster: the plan of rows stays
    monkeypatch.setattr(timed, "workers", ThreadPoolExecutor)  # which see it
    assert main(20, tmp_path) == 1
    printed = capsys.readouterr().out
    assert "times a member's time" in printed
    found = {row.metric: row.median for row in read_rows(tmp_path)}
    slower = found["windows where a member is faster by 1% than the plan of rows"]
    assert found["windows"] == 20
    assert 0 < slower <= found["violations"]
