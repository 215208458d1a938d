"""A run goes on as the same run on other ranks, head ranks, replicas, strategies and exchanges: losses to 1e-5."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_cases, run_ranks
from tests.train.test_run import read_rows, small, train

STEPS = 6
RESUMED = 2  # the checkpoint that every case goes on from
PLACES: list[tuple[str, int, dict[str, Any]]] = [  # ranks, and what differs there
    ("1 rank", 1, {}),
    ("2 ranks, head ranks", 2, {"parallel": {"head_ranks": 2}}),
    ("2 ranks, llama3", 2, {"sharding": {"name": "per_sequence"}, "exchange": {"name": "all_gather"}}),
    ("2 ranks, replicas", 2, {"data_parallel": 2}),
    ("4 ranks", 4, {}),
    ("4 ranks, head ranks", 4, {"parallel": {"head_ranks": 2}, "exchange": {"name": "ring"}}),
    ("4 ranks, ulysses", 4, {"sharding": {"name": "contiguous"}, "exchange": {"name": "ulysses"}}),
    ("4 ranks, replicas", 4, {"data_parallel": 2, "sharding": {"name": "per_document"}}),
]


def batches(out: Path, steps: int = STEPS, **changed: Any) -> dict[str, Any]:
    """Two windows a batch; documents are carried over from window to window."""
    config = small(out, checkpoint={"every": 2, "keep": 9, "asynchronous": True})
    sections = {name: {**config.get(name, {}), **value} for name, value in changed.items() if isinstance(value, dict)}
    config = {**config, "context": 259, "batch_windows": 2, **changed, **sections}
    # the rate does not depend on when a run was to end
    return {
        **config,
        "optimizer": {"warmup_steps": 0, "lr": 1e-3, "min_lr_ratio": 1.0},
        "loop": {**config["loop"], "steps": steps},
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run, on two ranks."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run_ranks(train, 2, batches(out))
    return out


def assert_goes_on(out: Path, whole: Path) -> None:
    rows, expected = read_rows(out), read_rows(whole)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5), row["step"]
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4), row["step"]
        for name in ("tokens", "labelled_tokens", "documents", "dropped_tokens", "carried_tokens"):
            assert row[name] == other[name], (name, row["step"])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_from_two_ranks_to_any_place(ranks: int, whole: Path, tmp_path: Path) -> None:
    cases = {name: changed for name, count, changed in PLACES if count == ranks}
    for name in cases:
        shutil.copytree(whole, tmp_path / name)
    at = {name: str(tmp_path / name / f"checkpoints/step_{RESUMED:08d}") for name in cases}
    run_cases(
        train, ranks, [(batches(tmp_path / name, checkpoint={"resume": at[name]}, **cases[name]),) for name in cases]
    )
    for name in cases:
        assert_goes_on(tmp_path / name, whole)


def test_from_place_to_place(whole: Path, tmp_path: Path) -> None:
    """2 ranks -> 4 with head ranks -> 1 -> 2 replicas of 2, each a step from where the one before stopped."""
    out = tmp_path / "run"
    shutil.copytree(whole / "checkpoints/step_00000002", out / "from")
    # 4 ranks wrote what 1 reads, head ranks what has none
    for steps, name in ((3, "4 ranks, head ranks"), (4, "1 rank"), (5, "4 ranks, replicas"), (6, "2 ranks, llama3")):
        _, ranks, changed = next(place for place in PLACES if place[0] == name)
        resume = "latest" if steps > 3 else str(out / "from")
        checkpoint = {"every": 1, "asynchronous": steps % 2 == 0, "resume": resume}
        run_ranks(train, ranks, batches(out, steps, checkpoint=checkpoint, **changed))
    losses = [row["loss"] for row in read_rows(out)]
    assert losses == pytest.approx([row["loss"] for row in read_rows(whole)][RESUMED:], rel=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"parallel": {"head_ranks": 2}}, r"^parallel\.head_ranks=2: expected a number that divides world_size=1$"),
        ({"data_parallel": 2}, r"^data_parallel=2: expected a divisor of world_size=1$"),
        ({"context": 300}, r"belongs to another run: run\.context is 259 there and 300 here$"),
        ({"model": {"kv_heads": 4}}, r"belongs to another run: model\.kv_heads is 2 there and 4 here$"),
    ],
)
def test_what_cannot_go_on_is_one_line(changed: dict[str, Any], message: str, whole: Path, tmp_path: Path) -> None:
    resume = {"checkpoint": {"resume": str(whole / f"checkpoints/step_{RESUMED:08d}")}}
    with pytest.raises(ValueError, match=message):
        train(batches(tmp_path / "run", **resume, **changed))
    assert not (tmp_path / "run").exists()
