"""Checkpoints belong to one model and one way of reading; anything else is refused by name."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flashcp.train.checkpoint import Progress, find_checkpoint, load_checkpoint, save_checkpoint
from flashcp.train.data.documents import Position
from flashcp.train.data.files_read import FilesRead
from flashcp.train.data.sources import Files, whole_text
from flashcp.train.lineage import Lineage
from flashcp.train.optimizer import OptimizerConfig, build_optimizer
from flashcp.train.ranks import Ranks
from tests.train.test_run import small, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    train(small(out, checkpoint={"every": 1}, loop={"steps": 2}))
    return out


def resume(finished: Path, out: Path, *, at: str = "latest", **sections: dict[str, Any]) -> None:
    shutil.copytree(finished, out)
    train(small(out, checkpoint={"resume": at}, loop={"steps": 3}, **sections))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"model": {"layers": 3, "kv_heads": 4}},
            r"another run: model\.layers is 2 there and 3 here; model\.kv_heads is 2 there and 4 here$",
        ),
        ({"model": {"vocab_size": 300}}, r"model\.vocab_size is 320 there and 300 here"),
        ({"data": {"source": "text", "path": __file__}}, r"data\.path is '' there and '.*test_checkpoint\.py' here"),
        ({"data": {"overflow": "truncate"}}, r"data\.overflow is 'carry' there and 'truncate' here"),
    ],
)
def test_a_checkpoint_of_another_run_names_the_fields(
    sections: dict[str, dict[str, Any]], message: str, finished: Path, tmp_path: Path
) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message):
        resume(finished, tmp_path / "run", **sections)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_memory_for_time_may_change_on_resume(finished: Path, tmp_path: Path) -> None:
    resume(finished, tmp_path / "run", model={"checkpoint_activations": True})
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_everything_a_step_depends_on_comes_back(tmp_path: Path) -> None:
    def made(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 3), nn.RMSNorm(3))
        optimizer = build_optimizer(model, OptimizerConfig())
        return model, optimizer

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()

    model, optimizer = made(1)
    step(model, optimizer)
    progress = Progress(7, 123, 45, Position(1, 2, 3, 4))
    alone, source = Ranks(0, 1, torch.device("cpu")), Files([Path("a"), Path("b"), Path("c")], partial(whole_text, 1))
    path = save_checkpoint(Lineage(tmp_path), 1, {}, model, optimizer, progress, FilesRead(source), alone)
    step(model, optimizer)

    again = made(2)
    assert load_checkpoint(path, *again, FilesRead(source), "stop", alone) == progress
    step(*again)
    for one, other in zip(model.parameters(), again[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_by_path(finished: Path, tmp_path: Path) -> None:
    first = finished / "checkpoints" / "step_00000001"
    train(small(tmp_path / "run", checkpoint={"resume": str(first)}, loop={"steps": 3}))
    # the new directory holds no rows of the steps before: only what this run did is told
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    with pytest.raises(ValueError, match=r"checkpoint\.resume='.*nowhere': no checkpoint there; expected never"):
        train(small(tmp_path / "run", checkpoint={"resume": str(tmp_path / "nowhere")}))


def test_a_run_does_not_start_over_another(finished: Path) -> None:
    with pytest.raises(ValueError, match=r"already holds step_00000002: go on with checkpoint\.resume=latest"):
        train(small(finished))


def test_latest_without_any_starts_fresh(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "latest", {}, 9) is None
    (tmp_path / "checkpoints" / "step_00000009").mkdir(parents=True)  # no identity: never became whole
    assert find_checkpoint(tmp_path, "latest", {}, 9) is None


def test_a_damaged_checkpoint_is_one_clear_error(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step_00000002" / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"step_00000002: \.metadata: cannot be read \(No such file or directory\)"):
        train(small(tmp_path / "run", checkpoint={"resume": "latest"}, loop={"steps": 3}))
    (tmp_path / "run" / "checkpoints" / "step_00000002" / "identity.json").write_text("{")
    with pytest.raises(ValueError, match=r"checkpoint .*step_00000002: identity\.json cannot be read"):
        train(small(tmp_path / "run", checkpoint={"resume": "latest"}, loop={"steps": 3}))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("checkpoints/step_00000002/identity.json", "[]", r"step_00000002: identity\.json cannot be read: TypeError"),
        ("checkpoints/step_00000002/.metadata", "", r"step_00000002: \.metadata: 0 bytes, expected \d+$"),
        ("checkpoints/step_00000002/__0_0.distcp", "", r"step_00000002: __0_0\.distcp: 0 bytes, expected \d+$"),
        ("metrics.jsonl", '{"step": 1\n', r"metrics\.jsonl:1: not a row of metrics"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(
    file: str, content: str, message: str, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        train(small(tmp_path / "run", checkpoint={"resume": "latest"}, loop={"steps": 3}))


def test_a_finished_run_has_nothing_to_resume(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(ValueError, match=r"^loop\.steps=2: checkpoint .*step_00000002 has done 2 steps already"):
        train(small(finished, checkpoint={"resume": "latest"}, loop={"steps": 2}))
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
