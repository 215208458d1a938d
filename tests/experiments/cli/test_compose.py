"""Configurations: every committed sweep composes and can run, method= sets its parts, the keys are a contract."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from flashcp.experiments.cli.bench import BENCHES
from flashcp.experiments.cli.compose import compose
from flashcp.experiments.cli.main import groups, verb_usage
from flashcp.experiments.cli.schema import DATA, GROUPS, SETTINGS, committed
from flashcp.experiments.cli.train import RunSettings, read_run
from flashcp.kernels.tuning import Blocks, Tuning
from flashcp.schema import read_dataclass
from flashcp.sharding.methods import METHODS
from flashcp.sharding.strategies import STRATEGIES
from flashcp.train.run import prepare
from tests.checkout import ROOT
from tests.experiments.jobs import expand

SWEEPS = sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml"))
SNAPSHOT = Path(__file__).with_name("command_line.txt")


@pytest.mark.parametrize("name", SWEEPS)
def test_every_committed_sweep_composes_and_could_run(name: str) -> None:
    first, second = (ROOT / f"conf/experiment/{name}.yaml").read_text().splitlines()[:2]
    assert (first, second) == ("# @package _global_", f"# flashcp sweep experiment={name}")
    jobs = expand("train", [f"experiment={name}"])
    assert len(jobs) > 1
    for job in jobs:
        run = read_run(job.settings)
        prepare(run.config, run.world_size)


def test_demo_is_what_the_readme_says() -> None:
    runs = [read_run(job.settings) for job in expand("train", ["experiment=demo"])]
    assert {"llama3", "per_document", "ring_zigzag", "ulysses", "flashcp_paper"} <= {run.provider for run in runs}
    assert {(run.world_size, run.config.loop.precision, run.config.data.source) for run in runs} == {
        (2, "fp32", "stdlib")
    }
    assert all(run.config.loop.steps >= 20 for run in runs)


def test_overlap_is_compared_within_one_attention() -> None:
    runs = [read_run(job.settings) for job in expand("train", ["experiment=overlap"])]
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
    jobs = expand("train", ["experiment=overlap", "seed=1,2", "parallel.overlap=none", "attention=cpu"])
    assert [(job.settings["seed"], job.settings["parallel"]["overlap"]) for job in jobs] == [(1, "none"), (2, "none")]
    jobs = expand("train", ["experiment=overlap", "attention=choice(cpu,triton)", "seed=range(1,3)"])
    varied = [
        (job.settings["model"]["layers"], job.settings["parallel"]["overlap"], job.settings["seed"]) for job in jobs
    ]
    assert varied == [
        (layers, level, seed) for layers in (2, 1) for level in ("none", "staged", "fused") for seed in (1, 2)
    ]
    with pytest.raises(ValueError, match=r"seed=interval\(1,3\): expected values to try, as key=a,b"):
        expand("train", ["seed=interval(1,3)"])


@pytest.mark.parametrize("method", METHODS.values(), ids=str)
@pytest.mark.parametrize("config", ["plan", "simulate", "train"])
def test_method_sets_sharding_and_exchange(config: str, method: Any) -> None:
    composed = compose(config, [f"method={method.name}"])
    assert (composed["method"], composed["sharding"]["name"], composed["exchange"]["name"]) == method


def test_sharding_and_exchange_replace_a_part_wherever_they_stand() -> None:
    for overrides in (["method=llama3", "exchange=exact"], ["exchange=exact", "method=llama3"]):
        composed = compose("plan", overrides)
        assert (composed["sharding"]["name"], composed["exchange"]["name"]) == ("per_sequence", "exact")


def test_options_of_a_strategy_are_keys_of_its_group() -> None:
    run = read_run(compose("train", ["method=flashcp_paper", "sharding.target_imbalance=1.2"]))
    assert run.config.sharding == {"name": "flashcp_paper", "target_imbalance": 1.2, "leaves": "head"}
    assert run.provider == "flashcp_paper"
    assert read_run(compose("train", ["sharding=contiguous", "exchange=exact"])).provider == "contiguous+exact"


def test_block_shapes_reach_the_operator() -> None:
    shapes = ["parallel.tuning.forward=128x64x8x3", "parallel.tuning.backward_q=32x16x4x1xtf32x3"]
    wanted = Tuning(forward=Blocks(128, 64, 8, 3), backward_q=Blocks(32, 16, 4, 1, "tf32x3"))
    assert read_run(compose("train", shapes)).config.parallel.operator("exact").tuning == wanted
    assert read_run(compose("train", [])).config.parallel.operator("exact").tuning == Tuning()


def test_varlen_kernels_reach_the_operator() -> None:
    operator = read_run(compose("train", ["parallel.attention=varlen:sdpa"])).config.parallel.operator("exact")
    assert (operator.attention_name, operator.overlap) == ("varlen:sdpa", "staged")
    option = ["experiment=overlap", "attention=varlen", "parallel.transport=auto"]
    run = read_run(compose("train", [*option, "parallel.overlap=staged"]))
    assert (run.config.parallel.attention, run.config.context) == ("varlen", 4096)
    with pytest.raises(
        ValueError, match=r"parallel\.overlap='fused' with attention='varlen': expected one of auto, none"
    ):
        read_run(compose("train", [*option, "parallel.overlap=fused"]))


def test_head_ranks_are_those_of_the_ranks_that_will_run() -> None:
    for head_ranks in ("2", "auto"):
        words = [f"parallel.head_ranks={head_ranks}", "parallel.cluster=h100-nvlink", "world_size=4"]
        run = read_run(compose("train", words))
        assert str(run.config.parallel.head_ranks) == head_ranks
        assert run.alone().config.parallel.head_ranks == 1
        run.alone().config.check(1)


def test_a_run_s_digest_is_of_what_decides_its_numbers() -> None:
    run, same, other = (
        read_run(compose("train", overrides))
        for overrides in ([], ["out=elsewhere", "tracker.wandb=disabled"], ["seed=1"])
    )
    assert run.digest == same.digest != other.digest
    assert run.alone().digest == read_run(compose("train", ["method=llama3"])).alone().digest


def test_groups_and_keys_are_as_documented() -> None:
    """The command line is a contract: when this fails, say so in CHANGELOG.md and write the file anew.

    python -c "from tests.experiments.cli.test_compose import *; SNAPSHOT.write_text(command_line())"
    """
    assert command_line() == SNAPSHOT.read_text()


def command_line() -> str:
    """Every group with its values and every key with its default."""
    lines = []
    for config in ("plan", "simulate", "train"):
        lines += [f"{config}: {name}={'|'.join(values)}" for name, values in groups(config).items()]
        for key, default in leaves(compose(config, [])):
            if key in (*GROUPS, "sharding.name", "exchange.name", "data.source") or ".provenance." in key:
                continue  # what groups set
            shown = "..." if key.startswith("cluster.") else default  # measured and fitted: they may change
            lines.append(f"{config}: {key}={shown}")
    for name in BENCHES:
        lines += [f"bench {name}: {key}={default}" for key, default in leaves(compose(f"bench/{name}", []))]
    return "\n".join(lines) + "\n"


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value).lower() if isinstance(value, bool) else str(value)


# --- conf/ and the code that reads it


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_has_a_file_for_each_member_of_its_registry_and_no_other(group: str) -> None:
    assert sorted(GROUPS[group]) == sorted(committed(group))


@pytest.mark.parametrize("config", ["plan", "simulate", "simulations", "train"])
def test_a_file_and_its_dataclass_have_the_same_tree_and_the_same_defaults(config: str) -> None:
    kind = RunSettings if config == "train" else SETTINGS[config]
    values, fields = compose(config, ["method=flashcp"]), dataclasses.asdict(read_dataclass(kind, {}))
    assert values.keys() == fields.keys()
    for key in values.keys() - {"method", "data", "sharding", "exchange", "cluster"}:
        assert values[key] == fields[key], key


def test_the_usage_names_every_benchmark() -> None:
    words = re.findall(r"\w+", (ROOT / "experiments/cli/usage.txt").read_text())
    assert BENCHES.keys() <= {*words}


@pytest.mark.parametrize("name", BENCHES)
def test_a_benchmark_s_file_has_the_defaults_of_its_dataclass(name: str) -> None:
    """A field may leave its default to the file."""
    values = compose(f"bench/{name}", [])
    del values["out"]
    kind = BENCHES[name]().settings
    assert values.keys() == {field.name for field in dataclasses.fields(kind)}
    left = {
        field.name: values[field.name]
        for field in dataclasses.fields(kind)
        if field.default is field.default_factory is dataclasses.MISSING
    }
    assert values == dataclasses.asdict(kind(**left))


@pytest.mark.parametrize("name", GROUPS["data"])
def test_data_has_the_defaults_of_its_dataclass(name: str) -> None:
    values = compose("plan", [f"data={name}"])["data"]
    kind = DATA[values["source"]]
    if name not in DATA:  # a committed variant of a source
        return
    assert (values["source"], values) == (name, dataclasses.asdict(kind(source=name)))


@pytest.mark.parametrize("name", GROUPS["sharding"])
def test_sharding_has_the_options_of_its_strategy_with_their_defaults(name: str) -> None:
    options = {key: item.default for key, item in inspect.signature(STRATEGIES[name]).parameters.items()}
    for key in ("document_lengths", "world_size", "cost", "workload"):
        options.pop(key, None)
    assert compose("plan", [f"sharding={name}"])["sharding"] == {"name": name, **options}


@pytest.mark.parametrize("name", GROUPS["exchange"])
def test_exchange_names_itself(name: str) -> None:
    assert compose("plan", [f"exchange={name}"])["exchange"] == {"name": name}


def test_every_key_is_explained_in_help() -> None:
    for verb, config in (("plan", "plan"), ("simulate", "simulate"), ("train", "train"), ("sweep", "train")):
        shown = verb_usage(verb)
        for key, _ in leaves(compose(config, [])):
            if not key.startswith(("cluster.", "exchange.")):
                assert re.search(rf"\n +{key.rpartition('.')[2]}:", shown), key
