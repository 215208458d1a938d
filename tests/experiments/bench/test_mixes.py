"""`flashcp bench mixes` on small windows: the mix's plan beside the causal one, both counted under the mix."""

from __future__ import annotations

import pytest

from flashcp.experiments.bench.mixes import WORKLOADS, MixesBench, bench_mixes, mixes_table
from flashcp.sharding.lengths import windows
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.strategies import plan


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
