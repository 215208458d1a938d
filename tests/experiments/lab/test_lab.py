"""The lab from end to end, as small as it gets: predicted, measured, faults met, nothing left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashcp.experiments.lab.cases import LabBench
from flashcp.experiments.lab.lab import bench_lab, lab_table, run_on_nodes
from flashcp.experiments.lab.machine import TAKEN
from flashcp.experiments.lab.nodes import Link, built_nodes
from flashcp.experiments.sweep.results import read_rows
from tests.experiments.lab.test_nodes import left

SMALL = LabBench(
    methods=["llama3", "flashcp"],
    faults=["flashcp"],
    nodes=2,
    ranks_per_node=1,
    context=512,
    windows=2,
    query_heads=2,
    kv_heads=2,
    head_dim=8,
    train_steps=2,
    timeout_s=5.0,
)
"""Ranks on different nodes."""


@pytest.mark.usefixtures("turn")
def test_a_small_lab(tmp_path: Path) -> None:
    rows, folder = bench_lab(SMALL, str(tmp_path / "lab"))
    assert not left()
    assert read_rows(folder) == rows
    assert (folder / "lab.png").stat().st_size > 10_000
    found = {(row.provider, row.metric): row for row in rows}
    assert {row.kind.split(":")[0] for row in rows} == {"emulated", "simulated"}
    assert found["flashcp", "speedup"].kind.endswith("; over gloo")
    for method in SMALL.methods:
        sent, routed = (found[method, metric].median for metric in ("link_mb", "route_mb"))
        assert routed < sent < 1.1 * routed + 0.05
    predicted = json.loads((folder / "predicted.json").read_text())
    assert [len(each) for each in predicted.values()] == [2, 2]
    watched = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines() if TAKEN in line]
    assert found["lab", TAKEN].median == max(one[TAKEN] for one in watched)
    assert len(watched) == 2  # while rates were measured, and while methods ran
    # So little is sent that a token bucket lets it through at once: how links slow down is tested in test_nodes.py.
    assert all(found["flashcp", f"{state}_ms"].median > 0 for state in ("whole", "half", "tenth"))
    assert found["flashcp", "silent"].median == 0
    assert 0 < found["flashcp", "cut_s"].median < 3 * SMALL.timeout_s
    for method in SMALL.methods:
        assert found[method, "train_step_ms"].median > 0
        assert found[method, "loss_difference"].median < 1e-4
    text = lab_table(rows)
    assert f"emulated: a node's link carries {1e3 * found['lab', 'link_gbps'].median:.3g} MB/s" in text
    assert "ranks without one" in text
    assert "one process alone" in text


@pytest.mark.usefixtures("turn")
def test_a_rank_that_fails_is_named_and_ends_the_others(tmp_path: Path) -> None:
    fail = "import os, time; os._exit(3) if os.environ['RANK'] == '1' else time.sleep(1000)"
    with built_nodes(2, 1, Link(1.0), 1.0) as nodes:
        outcome = run_on_nodes(nodes, 1, ["-c", fail], tmp_path / "log", lambda: None)
    assert outcome.code == 1
    assert outcome.error.startswith("rank 1: ended with exit code 3")
