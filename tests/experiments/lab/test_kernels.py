"""The kernels of a lab, timed before its ranks start."""

from __future__ import annotations

import pytest
import torch

from flashcp.experiments.lab import kernels
from flashcp.experiments.lab.cases import LabBench
from flashcp.experiments.lab.kernels import shapes_of, time_kernels

BENCH = LabBench(
    methods=["llama3", "ulysses", "flashcp:h2"],
    context=512,
    windows=1,
    query_heads=8,
    kv_heads=4,
    head_dim=8,
)


def test_heads_are_those_that_ranks_compute_on() -> None:
    """Eight ranks share the heads out under ulysses, two of a node under `:h2`."""
    assert [shape[:2] for shape in shapes_of(BENCH)] == [(8, 4), (4, 2), (1, 1)]
    assert {shape[2:] for shape in shapes_of(BENCH)} == {(8, 4)}


def test_a_machine_that_is_twice_as_slow_is_found_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(factor: float) -> float:
        def attention_us(_: object, schedules: list, shapes: list) -> list[list[float]]:
            pairs = [
                float(one.schedule.pairs * shape.query_heads) for one, shape in zip(schedules, shapes, strict=True)
            ]
            return [[factor * (10.0 + count) for count in pairs] for _ in range(2)]

        monkeypatch.setattr(kernels, "attention_us", attention_us)
        return time_kernels(BENCH).attention.forward.tflops

    assert timed(2.0) == pytest.approx(timed(1.0) / 2)


def test_this_machine_s_kernels_have_a_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SCHEDULES", 16)
    threads = torch.get_num_threads()
    machine = time_kernels(BENCH)
    assert machine.name == "lab"
    assert 1e-5 < machine.attention.forward.tflops < 100
    assert machine.copies.gbps > 0.01
    assert torch.get_num_threads() == threads
