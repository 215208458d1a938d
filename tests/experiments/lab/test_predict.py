"""The lab as the simulator knows it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flashcp.clusters import read_cluster
from flashcp.experiments.lab.cases import LabBench
from flashcp.experiments.lab.predict import lab_machine, predict
from flashcp.experiments.lab.scale import RATED, Rates, Scale
from flashcp.simulation import simulate
from flashcp.train.link import attention_operations

BENCH = LabBench(context=2048, windows=2, methods=["llama3", "flashcp"])
RATES = Rates(tflops=0.01, latency_us=2000.0, node_gbps=0.5, socket_gbps=10.0)
WHOLE = read_cluster("this_machine")


def test_the_machine_attends_at_the_rate_that_was_measured() -> None:
    machine = lab_machine(Scale(BENCH, RATES, 0.04), WHOLE)
    found = simulate(
        RATED, 1, cluster=machine, methods=["flashcp"], query_heads=8, kv_heads=8, head_dim=32, dtype_bytes=4
    )
    operations = attention_operations(RATED, BENCH.query_heads, BENCH.head_dim)
    assert operations / (1e9 * found["flashcp"].attention_ms) == pytest.approx(RATES.tflops, rel=1e-6)
    assert machine.links.network.gbps == 0.04  # of a node: its ranks share the port
    assert machine.links.shared_port
    assert machine.links.node.gbps == 0.5


def predicted(link_gbps: float, bench: LabBench = BENCH, **rates: float) -> dict[str, list[float]]:
    scale = Scale(bench, replace(RATES, **rates), link_gbps)
    return predict(scale, lab_machine(scale, WHOLE))


def test_a_slower_link_takes_more_from_who_sends_more() -> None:
    slow, fast = (predicted(gbps) for gbps in (0.005, 0.5))
    assert [len(slow[method]) for method in ("llama3", "flashcp")] == [2, 2]
    assert sum(slow["llama3"]) / sum(slow["flashcp"]) > sum(fast["llama3"]) / sum(fast["flashcp"]) > 1


def test_what_sockets_take_is_taken_from_attention() -> None:
    free, dear = predicted(50.0), predicted(50.0, socket_gbps=0.001)
    moved = 14 * 256 * BENCH.shape.kv_bytes  # seven blocks out, seven in; as much in the backward
    for before, after in zip(free["llama3"], dear["llama3"], strict=True):
        assert after - before == pytest.approx(2 * moved / (1e6 * 0.001), rel=0.05)
    assert sum(dear["flashcp"]) < 0.6 * sum(dear["llama3"])


def test_ranks_that_share_a_node_have_no_sockets() -> None:
    alone = replace(BENCH, replicas=4)
    assert predicted(50.0, alone, socket_gbps=1e-6) == predicted(50.0, alone)


def test_a_rate_that_no_link_of_the_lab_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"link_share=0.001 with shrink=1: gbps=.*expected GB/s from") as error:
        Scale.of(LabBench(link_share=0.001, shrink=1), RATES)
    assert "\n" not in str(error.value)


def test_a_links_rate_is_the_clusters_by_bytes_an_operation() -> None:
    one = Scale.of(BENCH, RATES)
    twice = Scale.of(BENCH, Rates(0.02, 2000.0, 0.5, 10.0))
    assert twice.link_gbps == pytest.approx(2 * one.link_gbps)
    assert f"{1e3 * one.link_gbps:.3g} MB/s = 50 GB/s of a rank of h100-ib-400g" in str(one)
