"""Configurations: every committed sweep composes and can run, method= sets its parts, the keys are a contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashcp.experiments.cli.bench import BENCHES, keys
from flashcp.experiments.cli.compose import compose, expand
from flashcp.experiments.cli.settings import read_run, register_run
from flashcp.experiments.cli.usage import config_keys, group_values
from flashcp.kernels.tuning import Blocks, Tuning
from flashcp.sharding.methods import METHODS
from flashcp.train.run import prepare
from tests.checkout import ROOT

SWEEPS = sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml"))
SNAPSHOT = Path(__file__).with_name("command_line.txt")


@pytest.fixture(autouse=True)
def _schema() -> None:
    register_run()


@pytest.mark.parametrize("name", SWEEPS)
def test_every_committed_sweep_composes_and_could_run(name: str) -> None:
    first, second = (ROOT / f"conf/experiment/{name}.yaml").read_text().splitlines()[:2]
    assert (first, second) == ("# @package _global_", f"# flashcp sweep experiment={name}")
    jobs = expand("config", [f"experiment={name}"])
    assert len(jobs) > 1
    for job in jobs:
        run = read_run(job.settings)
        prepare(run.config, run.world_size)


def test_demo_is_what_the_readme_says() -> None:
    runs = [read_run(job.settings) for job in expand("config", ["experiment=demo"])]
    assert {"llama3", "per_document", "ring_zigzag", "ulysses", "flashcp_paper"} <= {run.provider for run in runs}
    assert {(run.world_size, run.config.loop.precision, run.config.data.source) for run in runs} == {
        (2, "fp32", "stdlib")
    }
    assert all(run.config.loop.steps >= 20 for run in runs)


def test_overlap_is_compared_within_one_attention() -> None:
    runs = [read_run(job.settings) for job in expand("config", ["experiment=overlap"])]
    parallel = [run.config.parallel for run in runs]
    assert [(one.attention, one.overlap) for one in parallel] == [
        (attention, overlap) for attention in ("cpu", "triton") for overlap in ("none", "staged", "fused")
    ]
    assert [run.provider for run in runs] == [one.overlap for one in parallel]
    assert {one.transport for one in parallel} == {"shm"}
    assert all(one.throttle_gbps > 0 for one in parallel)
    assert all(run.case.endswith(f"+exact-{run.config.parallel.throttle_gbps:g}gbps") for run in runs)
    assert len({(run.case, run.config.parallel.attention) for run in runs}) == len({run.case for run in runs}) == 2


def test_an_override_replaces_what_a_committed_sweep_varies() -> None:
    jobs = expand("config", ["experiment=overlap", "seed=1,2", "parallel.overlap=none", "attention=cpu"])
    assert [(job.settings["seed"], job.settings["parallel"]["overlap"]) for job in jobs] == [(1, "none"), (2, "none")]
    jobs = expand("config", ["experiment=overlap", "attention=choice(cpu,triton)", "seed=range(1,3)"])
    varied = [
        (job.settings["model"]["layers"], job.settings["parallel"]["overlap"], job.settings["seed"]) for job in jobs
    ]
    assert varied == [
        (layers, level, seed) for layers in (2, 1) for level in ("none", "staged", "fused") for seed in (1, 2)
    ]
    with pytest.raises(ValueError, match=r"seed=interval\(1,3\): expected values to try, as key=a,b"):
        expand("config", ["seed=interval(1,3)"])


@pytest.mark.parametrize("method", METHODS.values(), ids=str)
@pytest.mark.parametrize("config", ["plan", "simulate", "config"])
def test_method_sets_sharding_and_exchange(config: str, method: Any) -> None:
    composed = compose(config, [f"method={method.name}"])
    assert (composed["method"], composed["sharding"]["name"], composed["exchange"]["name"]) == method


def test_sharding_and_exchange_replace_a_part_wherever_they_stand() -> None:
    for overrides in (["method=llama3", "exchange=exact"], ["exchange=exact", "method=llama3"]):
        composed = compose("plan", overrides)
        assert (composed["sharding"]["name"], composed["exchange"]["name"]) == ("per_sequence", "exact")


def test_options_of_a_strategy_are_keys_of_its_group() -> None:
    run = read_run(compose("config", ["method=flashcp_paper", "sharding.target_imbalance=1.2"]))
    assert run.config.parallel.sharding_options == {"target_imbalance": 1.2, "leaves": "head"}
    assert run.provider == "flashcp_paper"
    assert read_run(compose("config", ["sharding=contiguous", "exchange=exact"])).provider == "contiguous+exact"


def test_block_shapes_reach_the_operator() -> None:
    shapes = ["parallel.tuning.forward=128x64x8x3", "parallel.tuning.backward_q=32x16x4x1xtf32x3"]
    wanted = Tuning(forward=Blocks(128, 64, 8, 3), backward_q=Blocks(32, 16, 4, 1, "tf32x3"))
    assert read_run(compose("config", shapes)).config.parallel.operator().tuning == wanted
    assert read_run(compose("config", [])).config.parallel.operator().tuning == Tuning()


def test_varlen_kernels_reach_the_operator() -> None:
    operator = read_run(compose("config", ["parallel.attention=varlen:sdpa"])).config.parallel.operator()
    assert (operator.attention_name, operator.overlap) == ("varlen:sdpa", "staged")
    option = ["experiment=overlap", "attention=varlen", "parallel.transport=auto"]
    run = read_run(compose("config", [*option, "parallel.overlap=staged"]))
    assert (run.config.parallel.attention, run.config.context) == ("varlen", 4096)
    with pytest.raises(
        ValueError, match=r"parallel\.overlap='fused' with attention='varlen': expected one of auto, none"
    ):
        read_run(compose("config", [*option, "parallel.overlap=fused"]))


def test_a_run_s_digest_is_of_what_decides_its_numbers() -> None:
    run, same, other = (
        read_run(compose("config", overrides))
        for overrides in ([], ["out=elsewhere", "tracker.wandb=disabled"], ["seed=1"])
    )
    assert run.digest == same.digest != other.digest
    assert run.alone().digest == read_run(compose("config", ["method=llama3"])).alone().digest


def test_groups_and_keys_are_as_documented() -> None:
    """The command line is a contract: when this fails, say so in CHANGELOG.md and write the file anew.

    python -c "from tests.experiments.test_compose import *; SNAPSHOT.write_text(command_line())"
    """
    assert command_line() == SNAPSHOT.read_text()


def command_line() -> str:
    """Every group with its values and every key with its default."""
    lines = []
    for config in ("plan", "simulate", "config"):
        lines += [f"{config}: {name}={'|'.join(values)}" for name, values in group_values(config).items()]
        for key, default in config_keys(config):
            shown = "..." if key.startswith("cluster.") else default  # measured and fitted: they may change
            lines.append(f"{config}: {key}={shown}")
    for name in BENCHES:
        lines += [f"bench {name}: {key}={default}" for key, default in config_keys(keys([name]))]
    return "\n".join(lines) + "\n"
