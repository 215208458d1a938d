"""Calibration: parameters come back from times they made, and a small real run writes what the simulator reads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flashcp.clusters import read_cluster_file
from flashcp.experiments.bench.calibrate import (
    CalibrateBench,
    Calibration,
    bench_calibrate,
    calibration_table,
    layer_tflops,
    random_schedule,
    random_shape,
)
from flashcp.experiments.bench.calibration import (
    KernelSample,
    TimeRow,
    errors,
    fit_attention,
    fit_kernel,
    fit_line,
    fit_rates,
    kernel_us,
    read_times,
    total_features,
    write_times,
)
from flashcp.experiments.bench.harness import median_us
from flashcp.experiments.cli.main import main
from flashcp.simulator.cost import AttentionCost, AttentionShape, CopyCost, KernelCost, read_features
from tests.checkout import ROOT

SHAPE = AttentionShape(8, 2, 64, 4)


def samples(cost: AttentionCost, backward: bool, count: int = 60) -> list[KernelSample]:
    """Random shards with prefixes, and the times the cost gives them."""
    random = np.random.default_rng(5)
    made = []
    for _ in range(count):
        rows = random.integers(1, 900, random.integers(1, 9))
        before = random.integers(0, 2000, len(rows))
        reads = total_features(
            [read_features(rows, before, cost.tiles), read_features(rows, rows, cost.tiles, masked=True)]
        )
        shape = random_shape(SHAPE, random)
        blank = KernelSample(reads, int(rows.sum()), shape, 0.0)
        made.append(blank._replace(us=kernel_us(cost, blank, backward)))
    return made


@pytest.mark.parametrize("backward", [False, True])
def test_a_kernel_s_parameters_come_back(backward: bool) -> None:
    made = KernelCost(0.8, 30, 20, masked=1.5, merge_gbps=9, range_us=12, launch_us=40)
    cost = AttentionCost(made, made)
    found, error = fit_kernel(samples(cost, backward), backward)
    assert error < 1e-6
    for name in ("tflops", "masked", "kv_gbps", "query_gbps", "merge_gbps", "range_us", "launch_us"):
        assert getattr(found, name) == pytest.approx(getattr(made, name), rel=1e-3), name


def test_rates_are_never_negative() -> None:
    random = np.random.default_rng(0)
    design = random.random((40, 4))
    us = design @ np.array([2.0, 0.0, 1.0, 0.0]) - 0.05 * design[:, 1]
    rates, _ = fit_rates(design, us)
    assert (rates >= 0).all()
    assert rates[1] == 0
    assert fit_line([1, 2, 4], [7, 9, 13]) == pytest.approx((2, 5))
    assert fit_line([1, 2, 4], [1, 2, 4]) == pytest.approx((1, 0))
    with pytest.raises(ValueError, match="quieter machine"):
        fit_line([1, 2, 4], [-1, -2, -4])


def test_the_half_that_checks_fits_nothing() -> None:
    random = np.random.default_rng(1)
    schedules = [random_schedule([512], [2, 4], random) for _ in range(24)]
    shapes = [random_shape(SHAPE, random) for _ in schedules]
    times = [
        1e3 * (1 + one.schedule.pairs * shape.query_heads / 1e5) for one, shape in zip(schedules, shapes, strict=True)
    ]
    doubled = times[:12] + [2 * us for us in times[12:]]
    one, other = (fit_attention(schedules, shapes, (each, each), 12) for each in (times, doubled))
    assert one == other


def test_a_layer_s_rate_is_its_products_over_all_of_its_time() -> None:
    """A clock that says one second for everything."""
    seconds = iter(range(1000))
    shape = AttentionShape(4, 2, 16, 4)
    found = layer_tflops(shape, 32, 3, torch.device("cpu"), lambda: float(next(seconds)))
    dim, kv, ffn = 64, 32, 192
    assert found * 1e12 == pytest.approx(6 * 32 * (2 * dim * dim + 2 * dim * kv + 3 * dim * ffn))


def test_the_first_time_warms_up() -> None:
    clock = iter([0.0, 100.0, 100.0, 101.0, 101.0, 103.0, 103.0, 104.0])
    assert median_us(lambda: None, 3, torch.device("cpu"), lambda: next(clock)) == 1e6


def test_a_link_is_what_is_left_without_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of 10 GB/s read and written; an exchange clears and writes a block twice before it leaves at 2 GB/s."""
    module = "flashcp.experiments.bench.calibrate"
    monkeypatch.setattr(f"{module}.copy_us", lambda sizes, *_: [1 + 2 * size / 10e3 for size in sizes])
    monkeypatch.setattr(f"{module}.link_us", lambda sizes, *_: [100 + 5 * size / 10e3 + size / 2e3 for size in sizes])
    small = CalibrateBench(schedules=10, contexts=[256], world_sizes=[2], repeats=1, query_heads=2, kv_heads=1)
    (found,) = bench_calibrate(small)
    machine = found.machine
    assert (machine.copies.gbps, machine.copies.launch_us) == pytest.approx((10, 1))
    assert (machine.links.node.gbps, machine.links.node.latency_us) == pytest.approx((2, 100))


def test_a_small_calibration_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine.yaml"
    small = ["schedules=12", "contexts=[256]", "world_sizes=[2]", "repeats=1", "query_heads=2", "kv_heads=1"]
    assert main(["bench", "calibrate", *small, f"out={out}", "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1] == f"wrote {out}, {out.with_suffix('.csv')}, {out.with_suffix('.png')}"
    (row,) = json.loads(shown.out)["rows"]
    machine = read_cluster_file(str(out))
    assert machine.name == "mine"
    assert machine.attention.forward.tflops == pytest.approx(row["machine"]["attention"]["forward"]["tflops"], rel=1e-3)
    assert machine.links.node.gbps > 0.001
    assert "measured" in machine.provenance["attention"]
    times = read_times(out.with_suffix(".csv"))
    assert [(time.split, time.direction) for time in times] == [
        (split, direction) for split in ["fit"] * 12 + ["check"] * 12 for direction in ("forward", "backward")
    ]
    assert all(time.measured_us > 0 and time.predicted_us > 0 for time in times)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert main(["simulate", f"cluster_file={out}", "windows=1", "context=1024", "methods=[flashcp]"]) == 0


def test_the_table_of_a_calibration_rounds_its_numbers() -> None:
    machine = read_cluster_file(str(ROOT / "conf/cluster/this_machine.yaml"))
    cost = KernelCost(0.0752312, 1e6, 0.7138)
    machine = dataclasses.replace(machine, attention=AttentionCost(cost, cost, 16, 8), copies=CopyCost(10.9612345, 1.7))
    times = read_times(ROOT / "experiments/results/paper/calibration/this_machine.csv")
    lines = calibration_table([Calibration(machine, times)]).splitlines()
    shown = "tflops 0.07523, kv_gbps 1e+06, query_gbps 0.7138, masked 1, merge_gbps 0, range_us 0, launch_us 0"
    assert lines[4:8] == [
        f"forward   {shown}",
        f"backward  {shown}",
        "tiles     16 x 8 rows",
        "copies    gbps 10.96, launch_us 1.7",
    ]
    assert lines[8].startswith("link      gbps ")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"schedules": 5}, "schedules=5: expected a whole number >= 10"),
        ({"dtype": "fp16"}, "dtype='fp16': expected fp32 or bf16"),
        ({"contexts": []}, "contexts"),
        ({"seed": -1}, "seed=-1: expected a whole number >= 0"),
        ({"head_dim": 0}, "head_dim=0: expected an even number >= 2"),
        ({"head_dim": 15}, "head_dim=15: expected an even number >= 2"),
        ({"contexts": [1024, 8], "world_sizes": [8, 16]}, "at most half of each of contexts="),
        ({"query_heads": 3}, "query_heads=3: expected a multiple of kv_heads=2"),
    ],
)
def test_settings_that_describe_no_measurement(setting: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(bench_calibrate(CalibrateBench(**setting)))  # type: ignore[arg-type]


def test_errors_are_shares_of_what_was_measured(tmp_path: Path) -> None:
    rows = [
        TimeRow(i, split, "forward", 4, 1, 1, 1, 100.0, 100.0 + off, "cpu", "v", "c", "d")
        for i, (split, off) in enumerate([("fit", 50), ("check", 10), ("check", -20), ("check", 0)])
    ]
    assert errors(rows, "forward", "check") == pytest.approx((0.1, 0.19, 3))
    write_times(tmp_path / "times.csv", rows)
    assert read_times(tmp_path / "times.csv") == rows
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected the columns schedule"):
        read_times(tmp_path / "other.csv")


def test_committed_predictions_are_near_the_measurements() -> None:
    times = read_times(ROOT / "experiments/results/paper/calibration/this_machine.csv")
    for direction in ("forward", "backward"):
        found = errors(times, direction, "check")
        assert found.schedules == 200
        assert found.median < 0.10
        assert found.p95 < 0.25
