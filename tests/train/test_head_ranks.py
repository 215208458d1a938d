"""`parallel.head_ranks=auto`: one choice by rank 0 for all, told once, kept by checkpoints."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import flashcp
from flashcp.choice import Choice
from flashcp.clusters import read_cluster
from flashcp.train.checksums import read_identity, write_identity
from flashcp.train.config import TrainConfig
from flashcp.train.data.documents import read_documents
from flashcp.train.data.windows import pack_documents
from flashcp.train.ranks import world
from flashcp.train.run import prepare
from tests.ranks import RankError, run_cases, run_ranks
from tests.train.test_run import TIMES, assert_same_checkpoint, read_rows, small, train, without

CLUSTER = "h100-nvlink"
RANKS = 4


def auto(out: Path, **sections: Any) -> dict[str, Any]:
    """Two packs of two windows a step. The ring is slow here, one holder of all ranks is not."""
    config = small(
        out,
        parallel={"head_ranks": "auto", "cluster": CLUSTER},
        sharding={"name": "per_document"},
        exchange={"name": "ring"},
        **sections,
    )
    return {**config, "batch_windows": 2}


def expected(config: dict[str, Any]) -> Choice:
    read = TrainConfig.from_dict({**config, "checkpoint": {}, "out": config["out"] + "_other"})
    ready = prepare(read, RANKS)
    windows = pack_documents(read_documents(ready.source), ready.tokenizer, read.context, read.data.overflow)
    lengths = [next(windows).document_lengths.tolist() for _ in range(8)]
    return flashcp.choose(
        [lengths[i : i + 2] for i in range(0, 8, 2)],
        RANKS,
        read_cluster(CLUSTER),
        4,
        2,
        8,
        dtype_bytes=4,
        strategy="per_document",
        exchange="ring",
        data_parallel=1,
        overlap="staged",
    )


def trained(config: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The summary, and what this rank said on standard error."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        summary = train(config)
    return summary, said.getvalue()


def kept(out: Path, step: int) -> dict[str, Any]:
    file = out / "checkpoints" / f"step_{step:08d}" / "identity.json"
    chosen: dict[str, Any] = json.loads(file.read_text())["chosen"]
    return chosen


def test_the_fastest_is_chosen_once_and_learns_what_one_rank_does(tmp_path: Path) -> None:
    config = auto(tmp_path / "run", checkpoint={"every": 6})
    ranks = run_ranks(trained, RANKS, config)
    choice = expected(config)
    assert choice.head_ranks == 4 != min(choice.candidates).head_ranks
    said = [text.count("parallel.head_ranks=auto, simulated: ") for _, text in ranks]
    assert said == [1, 0, 0, 0]
    assert str(choice) in ranks[0][1]
    summary = ranks[0][0]
    assert summary["head_ranks"] == 4
    assert summary["config"]["parallel"]["head_ranks"] == "auto"
    assert kept(tmp_path / "run", 6)["head_ranks"] == 4
    train({**auto(tmp_path / "single"), "parallel": {}})
    losses = [row["loss"] for row in read_rows(tmp_path / "run")]
    assert losses == pytest.approx([row["loss"] for row in read_rows(tmp_path / "single")], rel=1e-5)


def test_a_resumed_run_has_the_checkpoint_s_number(tmp_path: Path) -> None:
    flat = {"optimizer": {"warmup_steps": 0, "lr": 1e-3, "min_lr_ratio": 1.0}}
    whole, half = auto(tmp_path / "whole", checkpoint={"every": 6}, **flat), tmp_path / "half"
    stopped = auto(half, checkpoint={"every": 3}, **flat)
    stopped["loop"] = {**stopped["loop"], "steps": 3}
    resumed = auto(half, checkpoint={"every": 3, "resume": "latest"}, **flat)
    run_cases(train, RANKS, [(whole,), (stopped,)])
    (_, said), *_ = run_ranks(trained, RANKS, resumed)
    assert f"head_ranks=4, as chosen for {half / 'checkpoints' / 'step_00000003'}" in said
    assert "simulated" not in said
    step = "checkpoints/step_00000006"
    assert_same_checkpoint(tmp_path / "whole" / step, half / step)
    assert without(read_rows(tmp_path / "whole"), TIMES) == without(read_rows(half), TIMES)
    assert kept(half, 6) == kept(half, 3) == kept(tmp_path / "whole", 6)

    changed = resume_from(half, resumed, {"head_ranks": 2})
    (summary, _), *_ = run_ranks(trained, RANKS, changed)
    assert summary["head_ranks"] == kept(half, 7)["head_ranks"] == 2  # what is written there, not chosen anew
    (summary, said), *_ = run_ranks(trained, RANKS, resume_from(half, resumed, {"world_size": 2, "head_ranks": 2}))
    assert "simulated" in said
    assert summary["head_ranks"] == 4


def resume_from(out: Path, config: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """One step more from the sixth, whose record of the choice is changed."""
    path = out / "checkpoints" / "step_00000006"
    shutil.rmtree(out / "checkpoints" / "step_00000007", ignore_errors=True)
    identity = read_identity(path)
    identity["chosen"].update(chosen)
    write_identity(path, identity)
    return {
        **config,
        "loop": {**config["loop"], "steps": 7},
        "checkpoint": {"every": 1, "keep": 9, "resume": str(path)},
    }


def told(rank_0_fails: bool) -> list[str]:
    """What every rank is told."""
    with world("cpu", 20) as ranks:

        def make() -> str:
            if rank_0_fails:
                raise ValueError(f"rank {dist.get_rank()} cannot")
            return f"rank {dist.get_rank()} chose"

        try:
            return [ranks.told(make), "told"]
        except ValueError as error:
            return [str(error), "raised"]


def test_rank_0_speaks_for_all_also_where_it_cannot() -> None:
    chose, cannot = run_cases(told, RANKS, [(False,), (True,)])
    assert chose == [["rank 0 chose", "told"]] * RANKS
    assert cannot == [["rank 0 cannot", "raised"]] * RANKS


def test_too_few_documents_are_named_by_every_rank(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("ab" * 300)
    data = {"source": "text", "path": str(tmp_path / "text"), "epochs": 1}
    with pytest.raises(RankError) as raised:
        run_ranks(train, RANKS, auto(tmp_path / "run", data=data))
    why = "ValueError: data.epochs=1: the documents fill 1 windows of context=515, expected at least batch_windows=2"
    assert str(raised.value).count(why) == RANKS
