"""`flashcp.simulate`: the numbers of the command line, for lengths and for plans; bad input in one line."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import flashcp
from flashcp.clusters import read_cluster
from flashcp.experiments.cli.main import main
from flashcp.simulator.summary import Summary
from flashcp.simulator.variants import VARIANTS
from tests.checkout import ROOT

LENGTHS = [7000, 4000, 2107]


def test_the_numbers_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    data = ["data=lengths", f"data.lengths={LENGTHS}".replace(" ", ""), f"context={sum(LENGTHS)}", "windows=1"]
    chosen = ["world_size=4", "cluster=h200-nvlink", "overlap=fused", "model.kv_heads=8", "model.layers=3"]
    assert main(["simulate", *data, *chosen, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    table = flashcp.simulate(LENGTHS, 4, cluster="h200-nvlink", overlap="fused", kv_heads=8, layers=3)
    assert [one._asdict() for one in table] == told["methods"]
    assert table.recommendation == told["recommendation"]
    assert (table.names, len(table)) == (tuple(VARIANTS), len(VARIANTS))


@pytest.mark.parametrize("overlap", ["none", "staged", "fused"])
def test_a_rank_alone_has_nothing_to_gain_and_nothing_of_others(overlap: str) -> None:
    for one in flashcp.simulate(LENGTHS, 1, overlap=overlap, methods=[*VARIANTS, "flashcp+all_gather", "flashcp+ring"]):
        assert (one.speedup, one.module_ms) == pytest.approx((1.0, one.attention_ms))
        assert (one.exchange_ms, one.exposed_exchange_ms, one.copies_ms, one.kv_buffer_mib) == (0.0, 0.0, 0.0, 0.0)


def test_several_packs_are_means() -> None:
    packs = [LENGTHS, [500, 12_000], np.array([13_000])]
    singly = [flashcp.simulate(pack, 4, methods="flashcp", head_ranks=2)["flashcp"] for pack in packs]
    together = flashcp.simulate(packs, 4, methods=["flashcp"], head_ranks=2, workers=2)
    assert together.windows == 3
    assert together["flashcp"].module_ms == pytest.approx(np.mean([one.module_ms for one in singly]))
    assert together["flashcp"].imbalance_max == max(one.imbalance for one in singly)
    assert flashcp.simulate(np.array([LENGTHS, LENGTHS[::-1]]), 4, methods="flashcp").windows == 2


@pytest.mark.parametrize("name", ["flashcp", "per_document"])
def test_a_plan_is_priced_as_its_strategy_is(name: str) -> None:
    plan = flashcp.plan(LENGTHS, 4, name)
    anonymous = flashcp.ShardingPlan.from_shards(LENGTHS, 4, plan.shards)
    methods = ["plan", "plan+ring", f"{name}+exact", f"{name}+ring", "llama3"]
    table = flashcp.simulate([anonymous, plan], methods=methods, plan_by="rows")
    assert (table.names, table.world_size, table.windows) == (tuple(methods), 4, 2)
    for mine, same in (("plan", f"{name}+exact"), ("plan+ring", f"{name}+ring")):
        assert table[mine] == table[same]._replace(name=mine, sharding="plan")
    assert table["plan"].speedup == table["llama3"].module_ms / table["plan"].module_ms
    assert flashcp.simulate(plan, 4).names == ("plan", *VARIANTS)


def test_a_plan_that_is_worse_is_told_apart() -> None:
    bad = flashcp.ShardingPlan.from_shards([6000, 6000], 2, [(0, 0, 6000, 0), (1, 0, 6000, 1)])
    good = flashcp.ShardingPlan.from_shards([6000, 6000], 2, [(0, 0, 3000, 0), (0, 3000, 6000, 1), (1, 0, 6000, 1)])
    assert flashcp.simulate(bad, methods="plan")["plan"].saving == 1
    assert flashcp.simulate(good, methods="plan")["plan"].imbalance > 1.3


def test_a_machine_of_ones_own() -> None:
    machine = read_cluster("h100-nvlink")
    slow = replace(machine, name="slow", links=replace(machine.links, node=replace(machine.links.node, gbps=1.0)))
    table = flashcp.simulate(LENGTHS, 4, cluster=slow)
    assert table.machine is slow
    assert table["llama3"].exchange_ms > 10 * flashcp.simulate(LENGTHS, 4)["llama3"].exchange_ms
    with pytest.raises(ValueError, match=r"^cluster\.gemm_tflops=0\.0: expected a number > 0$"):
        flashcp.simulate(LENGTHS, 4, cluster=replace(machine, gemm_tflops=0.0))


def test_the_table() -> None:
    table = flashcp.simulate(LENGTHS, 4, query_heads=2, kv_heads=1)
    head, names, _, *lines = str(table).splitlines()
    assert head == (
        "1 window, 4 ranks; simulated on h100-nvlink; 32 layers of 2 query and 1 KV heads of 128; left out: ulysses, "
        "for query_heads=2, kv_heads=1 cannot be shared out among 4 ranks"
    )
    assert names.split()[:2] == ["method", "imbalance"]
    assert (
        [line.split()[0] for line in lines] == list(table.names) == [name for name in VARIANTS if "ulysses" not in name]
    )
    assert table.columns == Summary._fields
    assert table.column("speedup") == {one.name: one.speedup for one in table}
    assert table.column("speedup")["llama3"] == 1
    with pytest.raises(KeyError, match="method 'ulysses': expected one of llama3, "):
        table["ulysses"]
    with pytest.raises(ValueError, match=r"^column 'ms': expected one of name, sharding, "):
        table.column("ms")


def test_what_the_documentation_shows() -> None:
    tried = doctest.testfile(str(ROOT / "docs/simulator.md"), module_relative=False)
    assert tried.attempted > 10
    assert tried.failed == 0


PLAN = flashcp.plan([64, 64], 2)


@pytest.mark.parametrize(
    ("packs", "given", "message"),
    [
        (LENGTHS, {}, "world_size=None: expected a whole number >= 1 and <= 1024"),
        (LENGTHS, {"world_size": 4.0}, r"world_size=4\.0: expected a whole number"),
        ([], {"world_size": 2}, r"packs=\[\]: expected document lengths of a pack or of several, or plans"),
        ("1000", {"world_size": 2}, "packs='1000': expected document lengths"),
        (1000, {"world_size": 2}, "packs=1000: expected document lengths"),
        ([100, 0], {"world_size": 2}, r"document_lengths\[1\]=0: expected a whole number >= 1"),
        ([[100], []], {"world_size": 2}, "document_lengths has shape"),
        ([1.5], {"world_size": 2}, "document_lengths holds float64"),
        ([PLAN, [64, 64]], {}, r"packs holds a plan and \[64, 64\]: expected plans alone, or document lengths alone"),
        (PLAN, {"world_size": 4}, "world_size=4 with plans for 2 ranks: expected one number of ranks"),
        ([PLAN, flashcp.plan([64], 4)], {}, "plans for 2, 4 ranks: expected one number of ranks"),
        (LENGTHS, {"world_size": 4, "cluster": "h1000"}, "cluster='h1000': expected one of a100-nvlink, "),
        (LENGTHS, {"world_size": 4, "cluster": 3}, "cluster=3: expected one of a100-nvlink, .*, or a Machine"),
        (LENGTHS, {"world_size": 4, "methods": "llama4"}, "methods: 'llama4': expected one of llama3, "),
        (LENGTHS, {"world_size": 4, "methods": ["plan"]}, "methods: 'plan': expected one of llama3, "),
        (
            LENGTHS,
            {"world_size": 3, "methods": "ulysses"},
            "ulysses: query_heads=32, kv_heads=32 cannot be shared out among 3 ranks",
        ),
        (LENGTHS, {"world_size": 4, "overlap": "full"}, "overlap='full': expected one of auto, none, staged, fused"),
        (LENGTHS, {"world_size": 4, "query_heads": 30}, "query_heads=30: expected a multiple of kv_heads=32"),
        (LENGTHS, {"world_size": 4, "workers": 0}, "workers=0: expected a whole number >= 1"),
    ],
)
def test_what_is_refused_in_one_line(packs: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as refused:
        flashcp.simulate(packs, **given)
    assert "\n" not in str(refused.value)


ALONE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused!r}:
            raise ModuleNotFoundError(f"no module named {{name}}", name=name)
sys.meta_path.insert(0, Refuse())
"""
HEAVY = ["torch", "triton", "hydra", "omegaconf", "pydantic", "pandas", "tqdm", "wandb", "matplotlib", "scipy"]


def run_without(refused: list[str], code: str) -> str:
    command = [sys.executable, "-c", ALONE.format(refused=refused) + code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_it_needs_numpy_and_numba_and_a_cluster_by_name_yaml() -> None:
    by_name = "import flashcp; print(flashcp.simulate([700, 300], 4)['flashcp'].module_ms)"
    table = flashcp.simulate([700, 300], 4)
    assert float(run_without(HEAVY, by_name)) == table["flashcp"].module_ms
    parts = "from flashcp.simulator.machine import *; from flashcp.simulator.cost import *\n"
    own = (
        f"{parts}import flashcp; print(flashcp.simulate([700, 300], 4, cluster={table.machine!r})['flashcp'].module_ms)"
    )
    assert float(run_without([*HEAVY, "yaml", "numba"], own)) == pytest.approx(table["flashcp"].module_ms)
    said = "import flashcp\ntry: flashcp.simulate([700, 300], 4)\nexcept ValueError as error: print(error)"
    assert run_without([*HEAVY, "yaml"], said).strip() == (
        "cluster='h100-nvlink': reading it needs PyYAML, which is not installed"
    )
