"""What a lab run measures, what it refuses before anything is built, and the bytes that leave nodes: from the routes,
against what an operator counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import flashcp
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.experiments.cli.main import main
from flashcp.experiments.lab.cases import ONE_PLAN, LabBench, Work, crossing_bytes, moved_bytes, shrunk
from flashcp.experiments.lab.training import train_configs
from flashcp.experiments.sweep.results import REFERENCE
from flashcp.schema import read_dataclass
from flashcp.simulator.cost import AttentionShape
from tests.packs import random_qkv
from tests.ranks import run_cases

SHAPE = AttentionShape(query_heads=4, kv_heads=4, head_dim=8, dtype_bytes=4)
LENGTHS = (90, 20, 7, 11)


def test_shrunk_lengths_keep_their_sum_and_proportions() -> None:
    lengths = np.array([700, 100, 30, 3, 3, 3, 1, 160])
    small = shrunk(lengths, 8)
    assert small.sum() == lengths.sum() // 8
    assert small.tolist() == [87, 13, 3, 1, 1, 20]


@pytest.mark.parametrize("data_set", ["pile", "redpajama", "wlb_llm"])
def test_windows_are_full(data_set: str) -> None:
    bench = LabBench(data_set=data_set, context=4096, windows=3, replicas=2)
    assert [[int(lengths.sum()) for lengths in batch] for batch in bench.batches] == [[4096, 4096]] * 3


def test_replicas_have_a_window_each_and_one_plan_has_them_all() -> None:
    bench = LabBench(methods=["llama3", "flashcp"], one_plan=["flashcp"], context=1024, windows=1, replicas=2)
    (batch,) = bench.batches
    works = bench.work(batch)
    assert list(works) == ["llama3", "flashcp", f"{ONE_PLAN}flashcp"]
    assert [(work.first, work.plan.world_size) for work in works["flashcp"]] == [(0, 4), (4, 4)]
    ((first, plan, exchange, _),) = works[f"{ONE_PLAN}flashcp"]
    assert (first, plan.world_size, exchange) == (0, 8, "exact")
    assert plan.document_lengths.tolist() == np.concatenate(batch).tolist()


def test_head_ranks_share_the_plan_of_fewer_holders() -> None:
    bench = LabBench(methods=["llama3", "flashcp:h2"], one_plan=["flashcp:h2"], context=1024, windows=1, replicas=2)
    bench.check()
    works = bench.work(bench.batches[0])
    assert [(work.first, work.plan.world_size, work.ranks) for work in works["flashcp:h2"]] == [(0, 2, 4), (4, 2, 4)]
    assert [(work.plan.world_size, work.ranks) for work in works[f"{ONE_PLAN}flashcp:h2"]] == [(4, 8)]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"nodes": 0}, "nodes=0"),
        ({"nodes": 1, "ranks_per_node": 1}, "expected 2 ranks or more"),
        ({"replicas": 3}, "replicas=3"),
        (
            {"nodes": 3, "ranks_per_node": 2, "replicas": 2, "methods": ["llama3"]},
            "replicas=2: expected a divisor of nodes=3",
        ),
        ({"link": "carrier-pigeon"}, "expected one of free, "),
        ({"data_set": "war_and_peace"}, "data_set='war_and_peace'"),
        ({"methods": ["flashcp"]}, "llama3"),
        ({"methods": ["llama3", "magic"]}, "magic"),
        ({"query_heads": 4, "kv_heads": 4}, "cannot be shared out among 8 ranks"),
        ({"methods": ["llama3", "flashcp:h4"]}, "ranks_per_node=2"),
        ({"methods": ["llama3", "flashcp:h2"], "query_heads": 3, "kv_heads": 3}, "cannot be shared out among 2 ranks"),
        ({"context": 4}, "context=4"),
        ({"query_heads": 6}, "query_heads=6"),
        ({"train_steps": 1}, "train_steps=1"),
        ({"timeout_s": 0.0}, "timeout_s=0"),
        ({"nodes": 10**6}, "nodes=1000000: expected at most 250"),
        ({"cores": 0.1}, "cores=0.1 for 8 ranks"),
        ({"cores": 1e6}, r"cores=1e\+06 for 8 ranks"),
        ({"cores": float("nan")}, "cores=nan"),
        ({"delay_us": -1.0}, "delay_us=-1"),
        ({"seed": 2**63}, "seed="),
        ({"shrink": 10**9}, "shrink=1000000000"),
        ({"one_plan": ["flashcp"]}, "replicas=1: expected 2 replicas"),
        ({"one_plan": ["magic"], "replicas": 2}, "one_plan: 'magic'"),
        ({"one_plan": ["flashcp:h3"], "replicas": 2}, "one_plan: 'flashcp:h3'"),
        ({"query_heads": 6, "kv_heads": 3}, "methods: 'ulysses': "),
        ({"methods": ["llama3", "ulysses:h2"]}, "methods: 'ulysses:h2': expected no :h"),
        ({"methods": ["llama3", "flashcp:d2"]}, "methods: 'flashcp:d2': expected a method that ranks run here"),
        ({"methods": ["llama3", "flashcp:h2:w4"]}, "methods: 'flashcp:h2:w4'"),
        ({"methods": ["llama3", "llama3_best_effort"]}, "methods: 'llama3_best_effort'"),
    ],
)
def test_what_makes_no_case_is_refused_in_one_line(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        read_dataclass(LabBench, {"cores": 1.0, **wrong}).check()
    assert "\n" not in str(error.value)


def test_the_defaults_are_a_case() -> None:
    LabBench(cores=1.0).check()  # as many as any machine has


def test_whole_steps_have_the_head_ranks_of_their_method() -> None:
    bench = LabBench(methods=["llama3", "flashcp:h2"], train_steps=2)
    configs = train_configs(bench, Path("train"))
    assert {name: config.parallel.head_ranks for name, config in configs.items()} == {
        "llama3": 1,
        "flashcp:h2": 2,
        REFERENCE: 1,
    }
    for config in configs.values():
        config.check(bench.world_size)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train_steps=2", "head_dim=7", "methods=[llama3]"], "model.dim=56"),
        (["out="], "out=''"),
        (["out=taken"], "taken/results.csv"),
        (["out=file"], "file is not a directory"),
    ],
)
@pytest.mark.parametrize("verb", [["bench", "lab"], ["sweep", "experiment=lab"]])
def test_bad_input_leaves_no_file(
    verb: list[str],
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken" / "results.csv").mkdir(parents=True)
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert main([*verb, "cores=1", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nodes=4,2,0", "out=lab/${nodes}"], "nodes=0: expected a whole number"),
        (["nodes=4,2"], "out='outputs/bench/lab': 2 labs would write there"),
        (["nodes=4,2", "out=${data_set}"], "out='pile': 2 labs would write there"),
        (["nodes=four,2"], "nodes='four'"),
        (["nodes=4,2", "replicas=4", "out=lab/${nodes}"], "replicas=4: expected a divisor of nodes=2"),
    ],
)
def test_all_labs_of_a_sweep_are_checked_before_the_first_begins(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # none is built
    assert main(["sweep", "experiment=lab", "cores=1", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not list(tmp_path.iterdir())


def test_where_no_lab_can_be_built_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no `ip` there; without root that is said first
    assert main(["bench", "lab", "cores=1", f"out={tmp_path / 'out'}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the lab needs " in line
    assert not list(tmp_path.iterdir())


def counted(exchange: str, strategy: str, kv_heads: int) -> tuple[int, float]:
    """Bytes that left this rank, as its operator counts them and as the routes say."""
    cp = flashcp.ContextParallel(exchange=exchange, timeout_s=20)
    plan = flashcp.plan(LENGTHS, 4, strategy)
    *qkv, grad = random_qkv(sum(LENGTHS), 4, kv_heads, 8, torch.float32, seed=0)
    q, k, v = (cp.shard(x, plan).requires_grad_() for x in qkv)
    cp.attention(q, k, v, plan).backward(cp.shard(grad, plan))
    return cp.sent_bytes, float(moved_bytes(plan, exchange, SHAPE._replace(kv_heads=kv_heads))[cp.rank].sum())


def test_what_moves_is_what_operators_count() -> None:
    kinds = (("flashcp", 4), ("per_document", 4), ("per_document", 2))  # 2 KV heads: `ulysses` sends each to two ranks
    cases = [(exchange, *kind) for exchange in EXCHANGE_CLASSES for kind in kinds]
    for results in run_cases(counted, 4, cases):
        for sent, said in results:
            assert sent == said > 0


@pytest.mark.parametrize("exchange", EXCHANGE_CLASSES)
def test_all_that_moves_crosses_where_each_rank_is_a_node_and_nothing_where_all_share_one(exchange: str) -> None:
    plan = flashcp.plan(LENGTHS, 4, "per_document")
    moved = moved_bytes(plan, exchange, SHAPE)
    assert crossing_bytes(Work(0, plan, exchange), SHAPE, 1).tolist() == moved.sum(axis=1).tolist()
    assert crossing_bytes(Work(0, plan, exchange), SHAPE, 4).tolist() == [0.0]
    assert (np.diagonal(moved) == 0).all()


def test_of_a_ring_only_the_last_rank_of_a_node_reaches_another() -> None:
    plan = flashcp.plan(LENGTHS, 4, "per_document")
    sent = moved_bytes(plan, "ring", SHAPE).sum(axis=1)
    assert crossing_bytes(Work(0, plan, "ring"), SHAPE, 2).tolist() == sent[[1, 3]].tolist()


@pytest.mark.parametrize("exchange", ["exact", "all_gather", "ring"])
def test_a_holder_on_a_node_sends_as_much_as_a_rank_would(exchange: str) -> None:
    plan = flashcp.plan(LENGTHS, 4, "per_document")
    alone = crossing_bytes(Work(0, plan, exchange), SHAPE, 1)
    assert crossing_bytes(Work(0, plan, exchange, head_ranks=2), SHAPE, 2).tolist() == alone.tolist()
    one_kv_head = SHAPE._replace(kv_heads=1)  # two ranks are sent it each
    twice = 2 * crossing_bytes(Work(0, plan, exchange), one_kv_head, 1)
    assert crossing_bytes(Work(0, plan, exchange, head_ranks=2), one_kv_head, 2).tolist() == twice.tolist()


def test_ranks_fill_their_nodes() -> None:
    with pytest.raises(ValueError, match="ranks_per_node=3"):
        crossing_bytes(Work(0, flashcp.plan(LENGTHS, 4), "exact"), SHAPE, 3)
