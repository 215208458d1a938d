"""`flashcp bench awkward` on small windows: bounds beside what was reached, members beside the strategy."""

from __future__ import annotations

import numpy as np
import pytest

from flashcp.experiments.bench import planner as bench_awkward
from flashcp.experiments.bench.planner import AwkwardBench, awkward_table, hard_windows
from flashcp.sharding.shards import ShardTable


def test_every_window_stands_beside_its_bound() -> None:
    rows = list(bench_awkward.bench_awkward(AwkwardBench([3], context=2048, random_windows=6)))
    values = {(row.case, row.provider, row.metric): row.median for row in rows}
    for name in hard_windows(2048, 3, 7):
        case = f"{name} 2K N=3"
        for metric in ("imbalance", "critical_rows"):
            assert values[case, "flashcp", metric] >= values[case, "certificate", metric]
    assert values["full 2K N=3", "flashcp", "critical_rows"] == 2048 - 2048 // 3 - 1
    assert rows[-1].median == 0
    assert "full 2K N=3" in awkward_table(rows)


def test_a_better_member_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ShardTable(*(np.array(column) for column in ([0, 1], [0, 0], [50, 50], [0, 1])))
    monkeypatch.setattr(bench_awkward, "members", lambda lengths, world_size: [whole])
    monkeypatch.setattr(bench_awkward, "plan", lambda lengths, world_size: _cut())
    assert bench_awkward._a_member_is_better(np.array([50, 50]), 2)


def _cut() -> object:
    from flashcp.sharding.strategies import plan

    return plan([50, 50], 2, "per_document")
