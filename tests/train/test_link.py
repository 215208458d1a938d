"""The slowed link: its rate from a cluster's file and this machine's attention, the same for all that take turns."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import flashcp
from flashcp.clusters import clusters
from flashcp.train.config import TrainConfig
from flashcp.train.link import SlowedLink, cluster_rates, measured_tflops
from flashcp.train.parallel import ParallelConfig
from flashcp.train.ranks import Ranks
from flashcp.train.run import run, run_in_turns
from tests.checkout import ROOT
from tests.ranks import RankError, run_ranks
from tests.train.test_run import small

SLOW = {"link": "h100-ib-400g", "transport": "shm"}


def test_the_rate_is_the_clusters_scaled_by_attention_here() -> None:
    file = yaml.safe_load((ROOT / "conf/cluster/h100-nvlink.yaml").read_text())  # h100-ib-400g's network and attention
    forward, backward = (file["attention"][name]["tflops"] for name in ("forward", "backward"))
    network_gbps, cluster_tflops = cluster_rates("h100-ib-400g")
    assert network_gbps == file["links"]["network"]["gbps"] == 50
    # 4 operations forward and 10 backward, each at its own rate
    assert 4 / forward + 10 / backward == pytest.approx(14 / cluster_tflops)
    link = SlowedLink("h100-ib-400g", network_gbps, cluster_tflops, here_tflops=0.05)
    assert link.gbps / 0.05 == pytest.approx(network_gbps / cluster_tflops)  # bytes per operation
    text = "rows leave at 0.0072 GB/s, the 50 GB/s of a rank of h100-ib-400g across nodes x 0.05 TFLOP/s"
    assert str(link).startswith(text)
    assert str(link).endswith(f"/ {cluster_tflops:.4g} there")


@pytest.mark.parametrize("name", clusters())
def test_every_cluster_has_a_rate(name: str) -> None:
    assert SlowedLink(name, *cluster_rates(name), 0.05).gbps > 0


def test_operations_are_counted_over_the_pairs_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = 0.25
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: seconds * next(clock))  # each look is a tick later
    alone = Ranks(0, 1, torch.device("cpu"))
    assert measured_tflops([3, 2], (4, 2, 8), alone) == pytest.approx(14e-12 * (6 + 3) * 4 * 8 / seconds)


def test_attention_is_really_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    attention = flashcp.varlen_attention

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append((arguments[0].shape, arguments[3], options))
        return attention(*arguments, **options)

    monkeypatch.setattr(flashcp, "varlen_attention", watched)
    assert measured_tflops([30, 20], (4, 2, 8), Ranks(0, 1, torch.device("cpu")), attention="cpu") > 0
    assert all(each == (torch.Size([50, 4, 8]), [30, 20], {"attention": "cpu"}) for each in seen)
    assert len(seen) > 3


def trained(config: dict[str, Any]) -> dict[str, Any] | None:
    return run(TrainConfig.from_dict(config))


def in_turns(configs: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
    return run_in_turns([TrainConfig.from_dict(config) for config in configs])


def test_all_that_take_turns_leave_at_one_rate(tmp_path: Path) -> None:
    exchanges = ("exact", "ring", "ulysses")
    configs = [small(tmp_path / name, parallel=SLOW, exchange={"name": name}, loop={"steps": 2}) for name in exchanges]
    run_ranks(in_turns, 2, configs)
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in exchanges]
    (rate,) = {summary["throttle_gbps"] for summary in summaries}
    (how,) = {summary["emulated"] for summary in summaries}
    assert 0 < rate < 50
    assert how.startswith(f"rows leave at {rate:.3g} GB/s, the 50 GB/s of a rank of h100-ib-400g")


def test_a_free_link_and_one_rank_alone_emulate_nothing(tmp_path: Path) -> None:
    (free, _) = run_ranks(trained, 2, small(tmp_path / "free", loop={"steps": 1}))
    alone = trained(small(tmp_path / "alone", parallel={"link": "h100-ib-400g"}, loop={"steps": 1}))
    typed = {"throttle_gbps": 1.0, "transport": "shm"}
    (throttled, _) = run_ranks(trained, 2, small(tmp_path / "typed", parallel=typed, loop={"steps": 1}))
    assert alone
    assert [one["emulated"] for one in (free, alone, throttled)] == ["", "", "rows leave at 1 GB/s"]


def test_rows_that_would_leave_at_once_stop_the_run(tmp_path: Path) -> None:
    for parallel in ({**SLOW, "transport": "gloo"}, {"throttle_gbps": 1.0, "transport": "gloo"}):
        with pytest.raises(RankError, match=r"parallel\.transport='gloo': rows leave at once there, not at .* GB/s"):
            run_ranks(trained, 2, small(tmp_path / "gloo", parallel=parallel))


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (
            ParallelConfig(link="ethernet"),
            r"parallel\.link='ethernet': expected one of free, a100-nvlink, h100-ib-400g",
        ),
        (
            ParallelConfig(link="h100-ib-400g", throttle_gbps=0.1),
            r"throttle_gbps=0\.1 with parallel\.link=h100",
        ),
    ],
)
def test_what_is_no_link_is_named(parallel: ParallelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parallel.check()
