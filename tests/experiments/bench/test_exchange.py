"""The exchange benchmark: its gate, what it counts, what it refuses, and a run from the command line."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flashcp.comm.exchanges.exact import Exact
from flashcp.comm.exchanges.receiving import GradientReturn
from flashcp.experiments.bench.exchange import exchange_table, main, options_of, to_row
from flashcp.experiments.bench.exchange_times import (
    ExchangeBench,
    Problem,
    check,
    measure,
    offered,
    operator,
    overlaps_of,
)
from flashcp.experiments.bench.harness import in_turns
from flashcp.experiments.cli.bench import keys as bench_keys
from flashcp.experiments.cli.compose import compose
from flashcp.experiments.cli.main import main as flashcp
from flashcp.experiments.sweep.results import Number, read_rows
from flashcp.sharding.exchanges import EXCHANGES
from flashcp.train.ranks import Ranks
from tests.checkout import ROOT
from tests.ranks import RankError, run_ranks

TINY = ExchangeBench(context=300, head_dim=8, query_heads=6, kv_heads=6, seconds=0.01, throttle_gbps=0.02)
CPU = torch.device("cpu")


def on_this_rank() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size(), CPU)


def measured(bench: ExchangeBench) -> list[Number]:
    return list(measure(bench, on_this_rank(), lambda line: None))


def test_every_exchange_is_counted_and_timed_on_every_transport() -> None:
    bench = dataclasses.replace(TINY, world_size=3)
    first, *others = run_ranks(measured, 3, bench)
    assert others == [first, first]
    numbers = {(tuple(number.provider.split("/")), number.metric): number for number in first}
    assert {pair for pair, _ in numbers} == {(where, name) for where in ("shm", "gloo") for name in EXCHANGES}
    for (pair, metric), number in numbers.items():
        if metric.startswith("sent_"):
            sent = bench.sampled().route(pair[1]).bytes(6, 6, 8, 4, backward=metric == "sent_backward_bytes")
            assert number.median == sent.max()
        elif not metric.startswith(("exposed_", "hidden_")):  # these are differences
            assert number.median > 0
        if number.p20 is not None and number.p80 is not None:
            assert number.p20 <= number.median <= number.p80
    for transport in ("shm", "gloo"):
        for exchange in EXCHANGES:
            levels = [
                metric.split("_")[1]
                for pair, metric in numbers
                if pair == (transport, exchange) and "exposed" in metric
            ]
            fused = transport == "shm" and exchange not in ("ring", "ulysses")
            assert levels == ([] if exchange == "ulysses" else ["none", "staged", *(["fused"] if fused else [])])
    moved, took, bandwidth = (
        numbers[("gloo", "exact"), metric].median for metric in ("sent_bytes", "exchange_ms", "bandwidth_gbps")
    )
    assert bandwidth == pytest.approx(moved / took / 1e6)


def test_throttled_rows_are_exposed_without_overlap_and_less_with_it() -> None:
    bench = dataclasses.replace(TINY, exchanges=["all_gather"], transports=["shm"], context=1024, throttle_gbps=0.0)
    bench = dataclasses.replace(bench, seconds=0.5)
    numbers = {number.metric: number.median for number in run_ranks(measured, 2, bench)[0]}
    # The rows of `exact` take as long as the local tiles; an all-gather moves more.
    bytes_of = {name: bench.sampled().route(name).bytes(6, 6, 8, 4).max() for name in ("exact", "all_gather")}
    transfer_ms = bytes_of["all_gather"] / numbers["throttle_gbps"] / 1e6
    assert 0 < bytes_of["exact"] / numbers["throttle_gbps"] / 1e6 < 3 * numbers["compute_ms"]
    assert numbers["exposed_none_ms"] > 0.8 * transfer_ms
    assert numbers["exchange_ms"] < transfer_ms  # by itself it is not slowed down


@contextmanager
def broken(name: str) -> Iterator[None]:
    """An exchange whose gradients come home too large, whose output is wrong, or that sends more than it should."""
    start, send_home = Exact.start, Exact.return_gradients

    def return_wrong(self: Exact, plan: Any, like: Tensor) -> GradientReturn:
        returned = send_home(self, plan, like)

        def add_to(local: Any) -> None:
            returned.add_to(local)
            local.k.mul_(1.01)

        return returned._replace(add_to=add_to)

    def start_wrong(self: Exact, plan: Any, k: Tensor, v: Tensor) -> Any:
        return start(self, plan, 1.01 * k, v)

    def start_again(self: Exact, plan: Any, k: Tensor, v: Tensor) -> Any:
        again = start(self, plan, k, v)
        again.transfer.wait()
        return start(self, plan, k, v)

    wrong: dict[str, tuple[type, str, Callable[..., Any]]] = {
        "gradients": (Exact, "return_gradients", return_wrong),
        "output": (Exact, "start", start_wrong),
        "bytes": (Exact, "start", start_again),
    }
    with patch.object(*wrong[name]) if name else patch.object(Exact, "start", start):
        yield


def gate(transport: str, wrong: str) -> None:
    with broken(wrong):
        check(operator(TINY, transport, "exact"), Problem(TINY, TINY.small(), on_this_rank()))


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_the_gate_lets_a_right_exchange_by_and_stops_a_wrong_one(transport: str) -> None:
    run_ranks(gate, 2, transport, "")
    for wrong, said in (("output", "is not timed"), ("gradients", "is not timed"), ("bytes", "the route says")):
        with pytest.raises(RankError, match=f"RuntimeError: {transport}/exact.*{said}") as failure:
            run_ranks(gate, 2, transport, wrong)
        assert all(f"rank {rank} of 2 raised" in str(failure.value) for rank in (0, 1))


def what_is_there(bench: ExchangeBench) -> tuple[dict[str, str], dict[str, list[str]]]:
    there = offered(bench, CPU)
    return there, {name: overlaps_of(bench, "shm", name) for name in EXCHANGES}


def test_transports_are_those_that_the_ranks_have() -> None:
    there, levels = run_ranks(what_is_there, 2, TINY)[0]
    assert there == {"shm": "", "gloo": ""}
    assert levels["exact"] == levels["compacted"] == levels["all_gather"] == ["none", "staged", "fused"]
    assert (levels["ring"], levels["ulysses"]) == (["none", "staged"], ["none"])
    with pytest.raises(RankError, match="transport='nccl' with device=cpu"):
        run_ranks(what_is_there, 2, dataclasses.replace(TINY, transports=["nccl"]))


def sleepy() -> tuple[list[float], list[float]]:
    order: list[str] = []
    times = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, on_this_rank(), 1e-9)
    assert order == ["a", "b"] * 6  # the first round warms up
    return times["a"].tolist(), times["b"].tolist()


def test_variants_take_turns() -> None:
    assert [len(times) for rank in run_ranks(sleepy, 2) for times in rank] == [5, 5, 5, 5]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("transports=[tcp]", "transports holds 'tcp': expected shm, gloo, nccl"),
        ("exchanges=[exact,nope]", "exchanges holds 'nope': expected exact, compacted"),
        ("transports=[nccl] device=cpu", "transport='nccl' with device=cpu: it moves rows of another device"),
        ("world_size=1", "world_size=1: expected a whole number >= 2"),
        ("context=1", "context=1: expected a whole number >= 2"),
        ("world_size=4 context=3", "context=3: expected at least one token a rank, 4"),
        ("data_set=nope", "data_set='nope': expected one of wlb_llm, pile, redpajama"),
        ("strategy=nope", "strategy='nope': expected one of contiguous"),
        ("dtype=fp64", "dtype='fp64': expected one of fp32, bf16"),
        ("seconds=0", "seconds=0.0: expected seconds > 0"),
        ("throttle_gbps=-1", "throttle_gbps=-1.0: expected a number >= 0"),
        ("query_heads=6", "query_heads=6: expected a multiple of kv_heads=8"),
        ("world_size=3", "query_heads=8, kv_heads=8: cannot be shared out among 3 ranks"),
        ("zz=1", "zz: no such override; expected one of transports"),
    ],
)
def test_bad_input_is_one_line(refused: Callable[..., str], words: str, said: str) -> None:
    assert refused("bench", "exchange", *words.split()).startswith(said)


def test_both_ways_to_start_it_take_the_same_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(compose(bench_keys(["exchange"]), [])) == {*vars(TINY), "out"}
    wrong = dataclasses.replace(TINY, exchanges=["exact", "ring"], seed=-1)
    assert main(options_of(wrong)) == 2
    assert capsys.readouterr().err == "bench_exchange: seed=-1: expected a whole number >= 0\n"


def test_a_run_where_hydra_omegaconf_and_wandb_are_not(tmp_path: Path) -> None:
    arguments = [*options_of(dataclasses.replace(TINY, exchanges=["exact"])), "--out", str(tmp_path / "made/here")]
    script = (
        "import sys; sys.modules.update(dict.fromkeys(('hydra', 'omegaconf', 'wandb'))); "
        f"from flashcp.experiments.bench.exchange import main; sys.exit(main({arguments}))"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    folder = tmp_path / "made/here"
    assert sorted(path.name for path in folder.iterdir()) == ["exchange.png", "results.csv"]
    rows = read_rows(folder)
    assert run.stdout == exchange_table(rows) + "\n"
    assert "shm/exact: right at overlap none, staged, fused\n" in run.stderr
    assert {(row.provider, row.device.split("; ")[1]) for row in rows} == {
        ("shm/exact", "CPU shared memory"),
        ("gloo/exact", "CPU, gloo over TCP"),
    }
    assert {(row.case, row.kind) for row in rows} == {("redpajama 300 N=2 flashcp 6:6x8 fp32", "measured")}


def test_a_rank_that_fails_is_one_line_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert flashcp(["bench", "exchange", "head_dim=1000000000", f"out={out}"]) == 1  # terabytes
    assert re.search(r"(?:^|\n)flashcp: error: rank [01] of 2: RuntimeError: .*memory.*\n$", capsys.readouterr().err)
    assert (out / "ranks.log").is_file()


def test_the_table_has_a_line_a_transport_and_exchange() -> None:
    told = {"device": "cpu x", "date": "today", "torch": "2"}
    numbers = [
        Number("shm/exact", "sent_bytes", "bytes", None, 2.5e6, None),
        Number("shm/exact", "hidden_staged", "share", 0.1, 0.5, 0.9),
        Number("gloo/ring", "sent_bytes", "bytes", None, 1e6, None),
    ]
    lines = exchange_table([to_row("work", number, told) for number in numbers]).splitlines()
    assert lines[0] == "work, of the busiest rank"
    assert [line.split() for line in lines[1:]] == [
        ["transport/exchange", "MB", "sent", "hidden", "staged"],
        ["-" * 18, "-------", "-------------"],
        ["shm/exact", "2.50", "0.50"],
        ["gloo/ring", "1.00"],
    ]
