"""Traces of profiled runs: who sends, computes and waits when, on which track."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from flashcp.comm.fabrics import shm
from flashcp.train.trace import STEPS
from tests.ranks import run_cases
from tests.train.test_run import small, train

LAYERS, THROTTLE_GBPS = 2, 0.004


class Trace:
    """One rank's file."""

    def __init__(self, path: Path) -> None:
        with gzip.open(path, "rt") as file:
            events = json.load(file)["traceEvents"]
        self.names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
        self.process = next(e["args"]["name"] for e in events if e["name"] == "process_name")
        self.slices = [e for e in events if e.get("cat") in ("user_annotation", "cpu_op")]

    def named(self, pattern: str) -> list[dict[str, Any]]:
        """Ranges by name, in order of time."""
        found = [e for e in self.slices if e["cat"] == "user_annotation" and re.fullmatch(pattern, e["name"])]
        return sorted(found, key=lambda e: e["ts"])

    def tracks(self, pattern: str) -> set[str]:
        return {self.names[e["tid"]] for e in self.named(pattern)}


def total(ranges: Iterable[dict[str, Any]]) -> float:
    return sum(e["dur"] for e in ranges)


def common(some: list[dict[str, Any]], others: list[dict[str, Any]]) -> float:
    """Time in which a range of each runs."""
    ends = [(max(a["ts"], b["ts"]), min(a["ts"] + a["dur"], b["ts"] + b["dur"])) for a in some for b in others]
    return sum(max(0.0, stop - start) for start, stop in ends)


def profiled(out: Path, overlap: str) -> dict[str, Any]:
    slow = {"transport": "shm", "throttle_gbps": THROTTLE_GBPS}
    sections = {"sharding": {"name": "per_document"}, "parallel": {**slow, "overlap": overlap}}
    config = small(out, **sections, loop={"steps": STEPS + 2, "accumulation": 1})
    return {**config, "context": 1024, "profile": True}


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Trace]]:
    """Of both ranks, by overlap, over a transport so slow that rows travel longer than local tiles take."""
    out = tmp_path_factory.mktemp("traces")
    cases = [(profiled(out / overlap, overlap),) for overlap in ("staged", "none")]
    run_cases(train, 2, cases)
    return {name: [Trace(out / name / f"trace/rank{rank}.json.gz") for rank in range(2)] for name in ("staged", "none")}


@pytest.mark.parametrize("overlap", ["staged", "none"])
def test_a_trace_holds_the_steps_after_the_first_and_names_ranks(traces: dict[str, list[Trace]], overlap: str) -> None:
    for rank, trace in enumerate(traces[overlap]):
        assert trace.process == f"rank {rank}"
        assert len(trace.named(r"ProfilerStep#\d+")) == STEPS
        other = 1 - rank
        for part in ("send rows", "forward", "backward"):
            calls = [e["name"] for e in trace.named(rf"attention \d+, {part}")]
            assert sorted(calls) == sorted(f"attention {LAYERS + 1 + i}, {part}" for i in range(LAYERS * STEPS))
        for name in (f"send rows to rank {other}", f"wait for rows of rank {other}", f"send gradients to rank {other}"):
            assert trace.named(re.escape(name)), name
        assert {e["name"] for e in trace.named(r"(send|wait).* rank .*")} == {
            f"{what} rank {other}"
            for what in ("send rows to", "send gradients to", "wait for rows of", "wait for gradients of")
        }


@pytest.mark.parametrize("overlap", ["staged", "none"])
def test_transfers_are_on_a_track_of_their_own(traces: dict[str, list[Trace]], overlap: str) -> None:
    for trace in traces[overlap]:
        assert trace.tracks(r"send .* to rank \d") == {"flashcp-puts"}
        assert trace.tracks(r".*tiles.*|wait .*|headers|gradients home") == {"model and attention"}


@pytest.mark.parametrize("overlap", ["staged", "none"])
def test_what_is_on_a_track_nests(traces: dict[str, list[Trace]], overlap: str) -> None:
    for trace in traces[overlap]:
        for track in trace.names:
            ends: list[float] = []
            for e in sorted((e for e in trace.slices if e["tid"] == track), key=lambda e: (e["ts"], -e["dur"])):
                while ends and ends[-1] <= e["ts"]:
                    ends.pop()
                assert not ends or e["ts"] + e["dur"] <= ends[-1] + 0.01, e  # us
                ends.append(e["ts"] + e["dur"])


def train_with_threads_that_end(config: dict[str, Any]) -> None:
    with patch.object(shm, "_IDLE_S", 0.001):
        train(config)


def test_a_thread_that_ended_keeps_its_name(tmp_path: Path) -> None:
    run_cases(train_with_threads_that_end, 2, [(profiled(tmp_path, "none"),)])
    for rank in range(2):
        trace = Trace(tmp_path / f"trace/rank{rank}.json.gz")
        assert trace.tracks(r"send .* to rank \d") == {"flashcp-puts"}
        assert len({e["tid"] for e in trace.named(r"send .* to rank \d")}) > 1, "no thread ended"


def test_staged_transfers_run_beside_local_tiles(traces: dict[str, list[Trace]]) -> None:
    for rank, trace in enumerate(traces["staged"]):
        local = trace.named("local tiles")
        remote = trace.named(rf"remote tiles \(from {1 - rank}\)")
        assert len(local) == len(remote) == LAYERS * STEPS
        assert not trace.named("all tiles.*")
        assert common(trace.named(r"send rows to rank \d"), local) > 0.2 * total(local)
        assert common(trace.named(r"send gradients to rank \d"), trace.named("gradients of local tiles")) > 0


def test_without_overlap_ranks_wait_for_what_travels(traces: dict[str, list[Trace]]) -> None:
    ranks = traces["none"]
    sent = sum(total(trace.named(r"send rows to rank \d")) for trace in ranks)
    waited = sum(total(trace.named(r"wait for rows of rank \d")) for trace in ranks)
    assert waited > 0.25 * sent  # of two ranks the later one need not wait long
    for trace in ranks:
        assert not trace.named("(local|remote) tiles.*")
        tiles, waits = trace.named("all tiles"), trace.named(r"wait for rows of rank \d")
        assert len(tiles) == len(waits) == LAYERS * STEPS
        for computed, wait in zip(tiles, waits, strict=True):
            assert wait["ts"] + wait["dur"] <= computed["ts"]


def test_a_rank_alone_leaves_a_trace_too_and_a_run_without_profile_takes_it_away(tmp_path: Path) -> None:
    config = small(tmp_path, loop={"steps": 2, "accumulation": 1})
    train({**config, "profile": True})
    trace = Trace(tmp_path / "trace/rank0.json.gz")
    assert trace.process == "rank 0"
    assert len(trace.named("all tiles")) == LAYERS
    assert [path.name for path in (tmp_path / "trace").iterdir()] == ["rank0.json.gz"]
    train(config)
    assert not (tmp_path / "trace").exists()
