"""Runs that take turns: the numbers of runs alone, one turn after another, one failure told."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from flashcp.train.config import TrainConfig
from flashcp.train.loop import Trainer
from flashcp.train.run import order_of_turn, run_in_turns
from tests.ranks import run_ranks
from tests.train.test_run import SHARED, TIMES, read_rows, small, train, without

METHODS = {"llama3": ("per_sequence", "all_gather"), "flashcp": ("flashcp", "exact"), "ring": ("contiguous", "ring")}


def configs(out: Path) -> list[dict[str, Any]]:
    return [
        small(out / name, sharding={"name": sharding}, exchange={"name": exchange})
        for name, (sharding, exchange) in METHODS.items()
    ]


def in_turns(written: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
    return run_in_turns([TrainConfig.from_dict(config) for config in written])


def test_each_trains_as_it_does_alone(tmp_path: Path) -> None:
    run_ranks(in_turns, 2, configs(tmp_path))
    train(small(tmp_path / "alone"))
    alone = read_rows(tmp_path / "alone")
    begun = set()
    for name in METHODS:
        rows = read_rows(tmp_path / name)
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in alone], rel=1e-5)
        assert without(rows, TIMES | SHARED | {"loss", "grad_norm"}) == without(
            alone, TIMES | SHARED | {"loss", "grad_norm"}
        )
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["step_times_ms"] == [row["step_ms"] for row in rows]
        assert summary["turns"]["runs"] == 3
        begun.add(summary["turns"]["begun"])
    assert len(begun) == 1


def test_a_step_of_one_comes_between_two_steps_of_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    step = Trainer.learn

    def watched(self: Trainer, *arguments: Any) -> Any:
        steps.append(self.cp.exchange)
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "learn", watched)
    in_turns(configs(tmp_path))
    names = [exchange for _, exchange in METHODS.values()]
    assert steps == [names[number] for turn in range(6) for number in order_of_turn(turn, 3)]


def test_everybody_goes_first_and_behind_everybody() -> None:
    orders = [order_of_turn(turn, 3) for turn in range(6)]
    assert [sorted(order) for order in orders] == [[0, 1, 2]] * 6
    assert [sum(order[0] == number for order in orders) for number in range(3)] == [2, 2, 2]
    behind = {pair for order in orders for pair in itertools.pairwise(order)}
    assert behind == {(a, b) for a in range(3) for b in range(3) if a != b}
    assert [order_of_turn(turn, 1) for turn in range(3)] == [[0]] * 3
    assert order_of_turn(1, 2) == [0, 1]


@pytest.mark.parametrize(
    ("section", "changed", "message"),
    [
        ("loop", {"steps": 7}, "loop.steps=6, 7: expected one value for runs that take turns"),
        ("data", {"overflow": "truncate"}, "data.overflow=carry, truncate: expected one value"),
    ],
)
def test_what_cannot_take_turns_is_named(section: str, changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        in_turns([small(tmp_path / "a"), small(tmp_path / "b", **{section: changed})])
    assert not list(tmp_path.iterdir())


def test_two_runs_of_one_folder_and_a_profile_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"out='.*a': expected a folder for each"):
        in_turns([small(tmp_path / "a"), small(tmp_path / "a")])
    with pytest.raises(ValueError, match="profile=True: expected False"):
        in_turns([small(tmp_path / "a"), {**small(tmp_path / "b"), "profile": True}])
    with pytest.raises(ValueError, match="no configuration"):
        run_in_turns([])
