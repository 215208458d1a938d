"""`flashcp bench awkward` on small windows: bounds beside what was reached, members beside the strategy; `flashcp bench
mixes`: the mix's plan beside the causal one, both counted under the mix."""

from __future__ import annotations

import numpy as np
import pytest

from flashcp.experiments.bench import planner
from flashcp.experiments.bench.planner import (
    WORKLOADS,
    AwkwardBench,
    MixesBench,
    awkward_table,
    bench_awkward,
    bench_mixes,
    hard_windows,
    mixes_table,
)
from flashcp.sharding.lengths import windows
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.shards import ShardTable
from flashcp.sharding.strategies import plan


def test_every_window_stands_beside_its_bound() -> None:
    rows = list(bench_awkward(AwkwardBench([3], context=2048, random_windows=6)))
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
    monkeypatch.setattr(planner, "members", lambda lengths, world_size: [whole])
    monkeypatch.setattr(planner, "plan", lambda lengths, world_size: _cut())
    assert planner._a_member_is_better(np.array([50, 50]), 2)


def _cut() -> object:
    return plan([50, 50], 2, "per_document")


def test_both_plans_are_counted_under_the_mix() -> None:
    rows = list(bench_mixes(MixesBench(["gemma3", "full"], ["pile"], [8192], [4], windows=2)))
    found = {(row.case, row.provider, row.metric): row.median for row in rows}
    pack = [*windows("pile", 8192, 2, 5)]
    masks, layers = WORKLOADS["gemma3"]
    same = [ShardingPlan.from_shards(p, 4, plan(p, 4).shards, masks, layers) for p in pack]
    case = "gemma3 pile 8K N=4"
    assert found[case, "flashcp_causal", "imbalance_max"] == max(one.imbalance for one in same)
    assert found[case, "flashcp", "imbalance_max"] <= 1.01 < found[case, "flashcp_causal", "imbalance_max"]
    assert found[case, "flashcp", "critical_rows_window"] <= found[case, "flashcp", "critical_rows_causal"]
    assert ("full pile 8K N=4", "flashcp", "critical_rows_causal") in found
    assert "gemma3 pile 8K N=4" in mixes_table(rows)
    with pytest.raises(ValueError, match="workloads='gemma': expected one of gemma3, gpt_oss, full"):
        list(bench_mixes(MixesBench(["gemma"], ["pile"], [8192], [4], windows=1)))
