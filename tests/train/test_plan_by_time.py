"""`parallel.cluster`: the trainer's plans are those that are predicted to be fastest there."""

from __future__ import annotations

import itertools
import json
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

import flashcp
from flashcp.train.config import TrainConfig
from flashcp.train.data.documents import read_documents
from flashcp.train.data.windows import pack_documents
from flashcp.train.run import prepare
from tests.ranks import run_ranks
from tests.train.test_run import read_rows, small, train

SHORT = [3000, 500, 100]
RANKS, STEPS = 4, 4


def config(**sections: object) -> TrainConfig:
    model = {"dim": 4096, "heads": 32, "kv_heads": 8}
    return TrainConfig.from_dict({"model": model, "loop": {"precision": "bf16"}, **sections})


def test_the_cluster_chooses_among_plans() -> None:
    on_cluster = {"cluster": "h100-ib-400g"}
    by_time = flashcp.plan(SHORT, 4, cost=flashcp.predicted_time("h100-ib-400g"))
    assert config(parallel=on_cluster).planner(4, 1)(SHORT) == by_time
    assert config().planner(4, 1)(SHORT) == flashcp.plan(SHORT, 4) != by_time


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"exchange": {"name": "ring"}}, {"exchange": "ring"}),
        ({"parallel": {"overlap": "none", "gradient_wire": "fp32"}}, {"overlap": "none", "gradient_wire": "fp32"}),
        ({"loop": {"precision": "fp32"}}, {"dtype_bytes": 4}),
        ({"model": {"dim": 2048, "heads": 16, "kv_heads": 16}}, {"query_heads": 16, "kv_heads": 16}),
    ],
)
def test_it_is_asked_about_this_run(sections: dict[str, dict[str, object]], told: dict[str, object]) -> None:
    parallel = {"cluster": "h100-nvlink", **sections.get("parallel", {})}
    planner = config(**{**sections, "parallel": parallel}).planner(4, 2)
    assert planner.args[0]["cost"] == flashcp.predicted_time("h100-nvlink", head_ranks=2, **told)


@pytest.mark.parametrize("sections", [{"sharding": {"name": "per_document"}}, {"exchange": {"name": "ulysses"}}])
def test_others_have_nothing_to_choose(sections: dict[str, dict[str, str]]) -> None:
    one, other = (config(**sections, parallel={"cluster": name}).planner(4, 1) for name in ("", "h100-nvlink"))
    assert one(SHORT) == other(SHORT)


@pytest.mark.parametrize(
    ("name", "by"), [("flashcp", "chosen by predicted time there"), ("per_document", "the same on any cluster")]
)
def test_a_run_says_what_a_cluster_does_to_its_plans(name: str, by: str, tmp_path: Path) -> None:
    given = small(tmp_path, parallel={"cluster": "h100-nvlink"}, sharding={"name": name})
    first, second = run_ranks(errors_of, 2, given)
    line = f"parallel.cluster=h100-nvlink: plans of sharding={name} are {by}\n"
    assert (first.count(line), second.count(line)) == (1, 0)


def errors_of(given: dict[str, Any]) -> str:
    """What a run writes on stderr."""
    with redirect_stderr(StringIO()) as text:
        train(given)
    return text.getvalue()


def test_a_run_learns_the_same_under_other_plans(tmp_path: Path) -> None:
    records = [json.dumps({"text": "x" * rows}) for rows in [64] * 60]
    (tmp_path / "short.jsonl").write_text("\n".join(records))
    data, loop = {"source": "jsonl", "path": str(tmp_path / "short.jsonl")}, {"steps": STEPS, "accumulation": 1}
    rows = {}
    for cluster in ("", "h100-nvlink"):
        given = small(tmp_path / f"on{cluster}", parallel={"cluster": cluster}, data=data, loop=loop)
        run_ranks(train, RANKS, given)
        rows[cluster] = read_rows(tmp_path / f"on{cluster}")
        read = TrainConfig.from_dict({**given, "out": str(tmp_path / "other")})
        ready = prepare(read, RANKS)
        windows = pack_documents(read_documents(ready.source), ready.tokenizer, read.context, read.data.overflow)
        plans = [read.planner(RANKS, 1)(window.document_lengths) for window in itertools.islice(windows, STEPS)]
        assert [row["critical_rows"] for row in rows[cluster]] == [plan.route("exact").critical_rows for plan in plans]
        assert [row["imbalance"] for row in rows[cluster]] == pytest.approx([plan.imbalance for plan in plans])
    losses = [[row["loss"] for row in one] for one in rows.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert rows[""][0]["critical_rows"] != rows["h100-nvlink"][0]["critical_rows"]
