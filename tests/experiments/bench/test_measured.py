"""Plans whose kernels were run: they ask for the launches that the cost model prices, and run them for real."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import flashcp
from flashcp.clusters import read_machine
from flashcp.experiments.bench.calibration import KernelSample, kernel_us, schedule_features
from flashcp.experiments.bench.kernel_times import KernelTimer, MeasuredPlanned, RankSchedule, rank_schedule
from flashcp.experiments.cli.compose import compose
from flashcp.experiments.cli.main import main
from flashcp.sharding.exchanges import EXCHANGES
from flashcp.simulator.cost import AttentionCost, AttentionShape, KernelCost
from flashcp.simulator.machine import Machine
from flashcp.simulator.pack import Batch, simulate_batch
from flashcp.simulator.planned import Planned, Setting
from flashcp.simulator.variants import VARIANTS, WINDOW, Variant

LENGTHS = [700, 1, 130, 17, 400, 33]
SHAPE = AttentionShape(4, 4, 16, 4)
COST = AttentionCost(KernelCost(1.0, 30, 20, launch_us=3), KernelCost(0.5, 20, 10, launch_us=7), 16, 1)
"""Keys are not padded and ranges cost nothing of their own, so that a prefix costs the same in pieces."""
SMALL = ["windows=1", "context=512", "world_size=2", "model.query_heads=2", "model.kv_heads=2", "model.head_dim=16"]
SMALL += ["model.dtype_bytes=4", "cluster=this_machine", "kernel=measured"]


class PricedTimer(KernelTimer):
    """Instead of running a schedule, prices exactly the ranges that it would have run."""

    def times(self, one: RankSchedule, shape: AttentionShape) -> tuple[float, float]:
        sample = KernelSample(schedule_features(one.schedule, COST.tiles), one.query_rows, shape, 0.0)
        return kernel_us(COST, sample, False), kernel_us(COST, sample, True)


@pytest.fixture(scope="module")
def machine() -> Machine:
    return replace(read_machine(compose("simulate", [])["cluster"]), attention=COST)


@pytest.mark.parametrize("strategy", flashcp.strategies())
def test_it_runs_the_launches_that_the_model_prices(machine: Machine, strategy: str) -> None:
    plan, setting = flashcp.plan(LENGTHS, 4, strategy), Setting(machine, SHAPE)
    model, measured = Planned(plan, setting), MeasuredPlanned(plan, setting, PricedTimer(torch.device("cpu")))
    for backward in (False, True):
        for name in ("whole_us", "step_us", "remote_us", "own_us", "read_us"):
            found, expected = (getattr(one, name)(backward) for one in (measured, model))
            np.testing.assert_allclose(found, expected, rtol=1e-9, err_msg=name)
    price = lambda plan, setting: MeasuredPlanned(plan, setting, PricedTimer(torch.device("cpu")))  # noqa: E731
    ours = [Variant(exchange, strategy, exchange) for exchange in EXCHANGES]
    variants = [trial for one in (*VARIANTS.values(), *ours) for trial in one.trials(setting, 4, WINDOW)]
    batches = (Batch([np.array(LENGTHS)], 4, setting, price=one) for one in (price, Planned))
    found, expected = (simulate_batch(batch, variants) for batch in batches)
    for one in variants:
        assert found[one] == pytest.approx(expected[one]), one


def test_a_schedule_of_some_sources_reads_their_rows_alone() -> None:
    plan = flashcp.plan(LENGTHS, 4, "per_document")
    whole = rank_schedule(plan, 2)
    parts = [rank_schedule(plan, 2, [source]) for source in range(4)]
    assert whole is not None
    assert sum(part.schedule.pairs for part in parts if part) == whole.schedule.pairs
    for source, part in enumerate(parts):
        assert part is None or set(part.schedule.source.tolist()) == {source}
    assert rank_schedule(flashcp.plan(LENGTHS, 4, "contiguous"), 0, [3]) is None


def test_simulate_with_measured_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *SMALL, "overlap=fused", "--json"]) == 0  # one launch a pass, as llama3's
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == "kernel=measured exchange=modelled"
    assert document["kernel_device"] == "cpu"
    methods = {method["name"]: method for method in document["methods"]}
    assert set(methods) == set(VARIANTS)
    assert methods["llama3"]["attention_ms"] == pytest.approx(methods["llama3_best_effort"]["attention_ms"])
    assert all(method["attention_ms"] > 0 for method in methods.values())
    assert main(["simulate", *SMALL]) == 0
    assert "; simulated on this_machine, its kernels measured on cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kernel=timed", "kernel='timed': expected one of modelled, measured"),
        ("workers=2", "workers=2: kernel=measured runs on one device, expected 1"),
        ("model.dtype_bytes=1", "model.dtype_bytes=1: kernel=measured expects 2 (bf16) or 4 (fp32)"),
    ],
)
def test_what_cannot_be_measured(override: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *SMALL, override]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_hours_of_a_cpu_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    long = ["data=lengths", "data.lengths=[131072]", "context=131072"]
    assert main(["simulate", *SMALL, *long]) == 2
    assert "kernel=measured on a CPU: 3e+11 causal pairs x heads x head_dim" in capsys.readouterr().err
