"""The lab as the simulator knows it, and its kernels, timed before its ranks start."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashcp.clusters import read_cluster
from flashcp.experiments.lab import predict as lab
from flashcp.experiments.lab.cases import RATED, LabBench
from flashcp.experiments.lab.predict import Rates, Scale, lab_machine, predict, shapes_of, time_kernels
from flashcp.simulation import simulate
from flashcp.train.link import attention_operations

BENCH = LabBench(context=2048, windows=2, methods=["llama3", "flashcp"])
KERNELS = LabBench(
    methods=["llama3", "ulysses", "flashcp:h2"],
    context=512,
    windows=1,
    query_heads=8,
    kv_heads=4,
    head_dim=8,
)
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


def test_heads_are_those_that_ranks_compute_on() -> None:
    """Eight ranks share the heads out under ulysses, two of a node under `:h2`."""
    assert [shape[:2] for shape in shapes_of(KERNELS)] == [(8, 4), (4, 2), (1, 1)]
    assert {shape[2:] for shape in shapes_of(KERNELS)} == {(8, 4)}


def test_a_machine_that_is_twice_as_slow_is_found_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(factor: float) -> float:
        def attention_us(_: object, schedules: list, shapes: list) -> list[list[float]]:
            pairs = [
                float(one.schedule.pairs * shape.query_heads) for one, shape in zip(schedules, shapes, strict=True)
            ]
            return [[factor * (10.0 + count) for count in pairs] for _ in range(2)]

        monkeypatch.setattr(lab, "attention_us", attention_us)
        return time_kernels(KERNELS).attention.forward.tflops

    assert timed(2.0) == pytest.approx(timed(1.0) / 2)


def test_this_machine_s_kernels_have_a_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "SCHEDULES", 16)
    threads = torch.get_num_threads()
    machine = time_kernels(KERNELS)
    assert machine.name == "lab"
    assert 1e-5 < machine.attention.forward.tflops < 100
    assert machine.copies.gbps > 0.01
    assert torch.get_num_threads() == threads
