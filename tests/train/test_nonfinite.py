"""A loss or gradients that are not finite: no weight changes, documents are named, the step is kept and repeated."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from flashcp.experiments.cli.main import main
from flashcp.train.lineage import find_latest
from flashcp.train.loop import Trainer
from flashcp.train.model import Decoder
from flashcp.train.nonfinite import MOST_SKIPPED
from flashcp.train.optimizer import FlatGradients
from tests.ranks import run_ranks
from tests.train.test_run import contents, read_rows, small, train

GOOD, BAD = "all is well with this text " * 20, "and the letter Z is in this one " * 3
"""The embedding of Z is not a number."""


def written(tmp_path: Path, texts: list[str], **sections: Any) -> dict[str, Any]:
    """A run that reads these texts, over and over."""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = {"source": "jsonl", "path": str(tmp_path / "texts.jsonl"), "overflow": "carry"}
    loop = {"steps": 6, "accumulation": 1, **sections.pop("loop", {})}
    return small(tmp_path / "run", data=data, loop=loop, **sections)


def spoilt(config: dict[str, Any]) -> str:
    """Train with the embedding of Z spoilt. Returns what the run ended with, or nothing."""
    draw = Decoder._draw_weights

    def spoil(model: Decoder, seed: int) -> None:
        draw(model, seed)
        with torch.no_grad():
            model.embedding.weight[ord("Z")] = torch.nan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "_draw_weights", spoil)
        try:
            train(config)
        except FloatingPointError as error:
            return str(error)
    return ""


def test_documents_ranks_and_the_first_layer_are_named(tmp_path: Path) -> None:
    config = written(tmp_path, [GOOD, GOOD, BAD])  # 541, 541 and 97 tokens: the third step's window has the Z
    first, second = run_ranks(spoilt, 2, config)
    assert first == second
    assert "step 3: the loss is nan, the norm of its gradients nan: " in first
    assert re.search(r"on rank \d first in the output of embedding;", first)
    assert re.search(r"in the loss of document 1 \(\d+ tokens\);", first), first
    assert "in the gradients of embedding.weight, " in first
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [1, 2]
    kept = tmp_path / "run/nonfinite/step_00000003"
    assert f"`flashcp train replay={kept}`" in first
    latest = find_latest(kept)
    assert latest is not None
    weights = contents(latest)
    assert weights["counters"].tolist()[0] == 2  # steps done
    assert not weights["model.embedding.weight"][ord("Z")].isfinite().any()
    assert sum(int((~x.isfinite()).sum()) for name, x in weights.items() if name.startswith("model.")) == 32


def test_a_kept_step_is_computed_once_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (message, _) = run_ranks(spoilt, 2, written(tmp_path, [GOOD, GOOD, BAD]))
    kept = tmp_path / "run/nonfinite/step_00000003"
    assert main(["train", f"replay={kept}"]) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == message.split("step 3: ")[1].split("; `flashcp")[0]
    assert f"the run found: {message.split('; `flashcp')[0]}" in shown.err
    assert sorted(path.name for path in (tmp_path / "run/nonfinite").iterdir()) == ["step_00000003"]


def test_what_does_not_come_again_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As where a memory cell had failed: the second forward, and the replay, are finite."""
    learn = Trainer.learn

    def once(trainer: Trainer, packs: Any) -> tuple[float, float]:
        loss, norm = learn(trainer, packs)
        return (float("inf"), norm) if trainer.progress.step == 2 else (loss, norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "learn", once)
        with pytest.raises(FloatingPointError, match=r"^step 2: the loss is inf, .*: computed once more, every"):
            train(written(tmp_path, [GOOD]))
    assert main(["train", f"replay={tmp_path / 'run/nonfinite/step_00000002'}"]) == 0
    assert capsys.readouterr().out.startswith("finite: the loss is ")


def test_skipped_documents_change_nothing_and_the_run_goes_on(tmp_path: Path) -> None:
    texts = [GOOD, GOOD, BAD, GOOD]
    skip = written(tmp_path, texts, loop={"on_nonfinite": "skip"}, checkpoint={"every": 3})
    assert spoilt(skip) == ""
    rows = read_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 4, 5, 6] or [row["step"] for row in rows] == [1, 2, 4, 5]
    stopped = {**written(tmp_path, texts), "out": str(tmp_path / "stopped")}
    kept = spoilt(stopped).split("checkpoint.resume=")[1].split(" ")[0]
    assert spoilt({**skip, "out": stopped["out"], "checkpoint": {"resume": kept}}) == ""
    again = read_rows(tmp_path / "stopped")
    assert [(row["step"], row["loss"]) for row in again] == [(row["step"], row["loss"]) for row in rows]


def test_skipping_ends_where_nothing_else_is_left(tmp_path: Path) -> None:
    config = written(tmp_path, [BAD], loop={"steps": 100, "on_nonfinite": "skip"})
    assert spoilt(config).startswith(f"step {MOST_SKIPPED}: the loss is nan")


def test_gradients_alone_are_enough_and_no_checkpoint_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of that step is finite: the weights after it would not have been."""
    add_up, calls = FlatGradients.sum_over_ranks, []

    def overflow(gradients: FlatGradients) -> None:
        add_up(gradients)
        calls.append(gradients)
        if len(calls) == 3:
            gradients._buffer[7] = torch.inf

    monkeypatch.setattr(FlatGradients, "sum_over_ranks", overflow)
    told = r"^step 3: the loss is \d.*, the norm of its gradients inf: "
    with pytest.raises(FloatingPointError, match=told) as error:
        train(written(tmp_path, [GOOD], checkpoint={"every": 1}))
    assert "in the gradients of embedding.weight; `flashcp" in str(error.value)
    latest = find_latest(tmp_path / "run")
    assert latest is not None
    assert latest.name == "step_00000002"
    for place in (latest, find_latest(tmp_path / "run/nonfinite/step_00000003")):
        assert place is not None
        assert all(x.isfinite().all() for x in contents(place).values() if isinstance(x, torch.Tensor))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["replay=no/where"], "replay='no/where': no step that a run kept there: step.json: cannot be read"),
        (["replay=no/where", "loop.steps=3"], "replay= with loop.steps=3: expected replay= alone"),
        (["replay=no/where", "-m"], "replay= with replay=no/where: expected replay= alone"),
    ],
)
def test_what_is_no_kept_step_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_kept_step_that_was_changed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoilt(written(tmp_path, [BAD]))
    kept = tmp_path / "run/nonfinite/step_00000001"
    whole = json.loads((kept / "windows.json").read_text())
    capsys.readouterr()
    for change in ({"tokens": [10**9] * len(whole[0]["tokens"])}, {"document_lengths": [1]}, {"document_lengths": []}):
        (kept / "windows.json").write_text(json.dumps([whole[0] | change]))
        assert main(["train", f"replay={kept}"]) == 2
        error = capsys.readouterr().err
        assert "windows.json cannot be read" in error
        assert error.count("\n") == 1
