"""The batch of all replicas: one plan over all ranks learns what replicas learn, and what one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_cases, run_ranks
from tests.train.test_run import (
    SHARED,
    TIMES,
    assert_same_checkpoint,
    contents,
    read_rows,
    small,
    train,
    without,
)

WINDOWS = 2
STEPS = 6


def batch(out: Path, data_parallel: int, **sections: Any) -> dict[str, Any]:
    config = small(out, loop={"steps": STEPS, "accumulation": 1}, checkpoint={"every": STEPS}, **sections)
    return {**config, "batch_windows": WINDOWS, "data_parallel": data_parallel}


def test_one_plan_and_replicas_learn_what_one_process_does(tmp_path: Path) -> None:
    train(batch(tmp_path / "single", 1))
    cases = {
        "one_plan": (1, 1, "flashcp", "exact"),
        "one_plan_of_two_holders": (1, 2, "flashcp", "exact"),
        "replicas": (2, 1, "flashcp", "exact"),
        "replicas_of_a_holder": (2, 2, "flashcp", "exact"),
        "ring": (2, 1, "per_document", "ring"),
        "ulysses": (2, 1, "contiguous", "ulysses"),  # 2 KV heads: over 2 ranks, not over 4
        "alone": (4, 1, "flashcp", "exact"),
    }
    windows = {"alone": 4}
    configs = [
        (
            {
                **batch(tmp_path / name, replicas, sharding={"name": sharding}, exchange={"name": exchange}),
                "parallel": {"head_ranks": heads},
                "batch_windows": windows.get(name, WINDOWS),
            },
        )
        for name, (replicas, heads, sharding, exchange) in cases.items()
    ]
    run_cases(train, 4, configs)
    train({**batch(tmp_path / "single_of_four", 1), "batch_windows": 4})
    for name in cases:
        other = tmp_path / ("single_of_four" if name == "alone" else "single")
        rows, single = read_rows(tmp_path / name), read_rows(other)
        assert len(rows) == len(single) == STEPS
        for row, expected in zip(rows, single, strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5), (name, row["step"])
            assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), (name, row["step"])
        inexact = TIMES | SHARED | {"loss", "grad_norm"}
        assert without(rows, inexact) == without(single, inexact)
        state, whole = (contents(out / "checkpoints" / f"step_{STEPS:08d}") for out in (tmp_path / name, other))
        for key, value in whole.items():
            if isinstance(value, torch.Tensor) and key.endswith("exp_avg"):
                assert torch.allclose(state[key], value, rtol=1e-3, atol=1e-6 + 1e-4 * value.abs().max()), (name, key)

    one, two = (read_rows(tmp_path / name) for name in ("one_plan", "replicas"))
    assert one[0]["tokens"] == two[0]["tokens"] == WINDOWS * 515
    assert one[0]["imbalance"] <= 1.03  # a few hundred rows a rank
    assert max(row["imbalance"] for row in two) > 1.05  # a replica's share of the work, not only a rank's in it
    assert all(row["critical_rows"] >= row["critical_rows_bound"] for row in one + two)


def test_a_resumed_run_of_replicas_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = batch(tmp_path / "whole", 2)
    first = {**batch(tmp_path / "halves", 2), "checkpoint": {"every": 3}}
    second = {**first, "checkpoint": {"every": 3, "resume": "latest"}}
    stopped = {**first, "loop": {**first["loop"], "steps": 3}, "optimizer": first["optimizer"]}
    flat = {"optimizer": {"warmup_steps": 0, "lr": 1e-3, "min_lr_ratio": 1.0}}  # the same rate whatever the steps
    run_cases(train, 4, [({**config, **flat},) for config in (whole, stopped, second)])
    step = f"checkpoints/step_{STEPS:08d}"
    assert_same_checkpoint(tmp_path / "whole" / step, tmp_path / "halves" / step)
    assert without(read_rows(tmp_path / "whole"), TIMES) == without(read_rows(tmp_path / "halves"), TIMES)


def test_one_plan_goes_on_where_replicas_stopped(tmp_path: Path) -> None:
    stopped = batch(tmp_path / "run", 2)
    stopped["loop"] = {**stopped["loop"], "steps": 3}
    stopped["checkpoint"] = {"every": 3}
    run_ranks(train, 4, stopped)
    train(batch(tmp_path / "single", 1))
    run_ranks(train, 4, {**batch(tmp_path / "run", 1), "checkpoint": {"resume": "latest"}})
    positions = [(row["epoch"], row["carried_tokens"]) for row in read_rows(tmp_path / "run")]
    assert positions == [(row["epoch"], row["carried_tokens"]) for row in read_rows(tmp_path / "single")]
