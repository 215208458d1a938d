"""Whole runs: the same losses on any number of ranks, resumed runs equal to the bit, the files they leave."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import flashcp
from flashcp.comm.errors import ExchangeTimeoutError
from flashcp.train.config import TrainConfig
from flashcp.train.data.windows import NO_LABEL
from flashcp.train.model import Decoder
from flashcp.train.run import run
from tests.ranks import run_cases, run_ranks

TIMES = {"step_ms", "attention_ms", "exposed_exchange_ms", "wait_ms", "loader_ms", "tokens_per_s"}
SHARED = {"critical_rows", "critical_rows_bound", "saving", "imbalance"}


def small(out: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run of a few seconds; sections override."""
    config: dict[str, dict[str, Any]] = {
        "data": {"overflow": "carry"},
        "model": {"layers": 2, "dim": 32, "heads": 4, "kv_heads": 2},
        "optimizer": {"warmup_steps": 2, "lr": 1e-3},
        "loop": {"steps": 6, "accumulation": 2, "progress": False, "device": "cpu"},
        "tracker": {"wandb": "disabled"},
    }
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section}
    return {"out": str(out), "context": 515, **config}


def train(config: dict[str, Any]) -> dict[str, Any] | None:
    return run(TrainConfig.from_dict(config))


def read_rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without(rows: list[dict[str, Any]], names: set[str]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


def contents(checkpoint: Path) -> dict[str, Any]:
    """Everything a checkpoint holds, by flat name."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata()
    state: dict[str, Any] = {}
    for name, entry in metadata.state_dict_metadata.items():
        is_tensor = isinstance(entry, TensorStorageMetadata)
        state[name] = torch.zeros(entry.size, dtype=entry.properties.dtype) if is_tensor else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=checkpoint)
    return state


def assert_same_checkpoint(one: Path, other: Path) -> None:
    first, second = contents(one), contents(other)
    assert first.keys() == second.keys()
    assert len([value for value in first.values() if isinstance(value, torch.Tensor)]) > 50
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[name]), name
        else:
            assert value == second[name], name


def test_no_optimizer_step_on_rows_that_never_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: steps.append(1))

    def late(cp: flashcp.ContextParallel) -> None:
        raise ExchangeTimeoutError("rank 0 waited 60 s for the rows of rank 1 (epoch 3)")

    monkeypatch.setattr(flashcp.ContextParallel, "synchronize", late)
    with pytest.raises(ExchangeTimeoutError, match="for the rows of rank 1"):
        train(small(tmp_path))
    assert not steps
    monkeypatch.undo()


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("single") / "run"
    summary = train(small(out))
    assert summary is not None
    return read_rows(out)


METHODS = [
    ("per_sequence", "all_gather"),
    ("per_document", "ring"),
    ("contiguous", "ulysses"),
    ("flashcp_paper", "compacted"),
    ("flashcp", "exact"),
]


def test_every_method_on_two_ranks_gives_the_losses_of_one(single: list[dict[str, Any]], tmp_path: Path) -> None:
    cases = [
        (small(tmp_path / sharding, sharding={"name": sharding}, exchange={"name": exchange}),)
        for sharding, exchange in METHODS
    ]
    run_cases(train, 2, cases)
    for sharding, exchange in METHODS:
        rows = read_rows(tmp_path / sharding)
        assert len(rows) == len(single) == 6
        for row, alone in zip(rows, single, strict=True):
            assert row["loss"] == pytest.approx(alone["loss"], rel=1e-5), (exchange, row["step"])
            assert row["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4), (exchange, row["step"])
        inexact = TIMES | SHARED | {"loss", "grad_norm"}
        assert without(rows, inexact) == without(single, inexact)
        assert rows[0]["exposed_exchange_ms"] > 0
        assert rows[0]["attention_ms"] > 0


def test_head_ranks_give_the_losses_of_one_rank(single: list[dict[str, Any]], tmp_path: Path) -> None:
    cases = [(small(tmp_path / str(h), parallel={"head_ranks": h}),) for h in (2, 4)]  # 4: two ranks share a KV head
    run_cases(train, 4, cases)
    for head_ranks in (2, 4):
        losses = [row["loss"] for row in read_rows(tmp_path / str(head_ranks))]
        assert losses == pytest.approx([row["loss"] for row in single], rel=1e-5)


def test_three_ranks_and_a_context_they_do_not_divide(single: list[dict[str, Any]], tmp_path: Path) -> None:
    run_ranks(train, 3, small(tmp_path / "run"))
    losses = [row["loss"] for row in read_rows(tmp_path / "run")]
    assert losses == pytest.approx([row["loss"] for row in single], rel=1e-5)


def test_windows_of_fewer_tokens_than_ranks(tmp_path: Path) -> None:
    tiny = {"context": 2, "model": {"layers": 1, "dim": 24, "heads": 3, "kv_heads": 3}}
    train({**small(tmp_path / "single"), **tiny})
    cases = [
        ({**small(tmp_path / exchange, sharding={"name": strategy}, exchange={"name": exchange}), **tiny},)
        for strategy, exchange in METHODS
    ]
    run_cases(train, 3, cases)
    for _, exchange in METHODS:
        for row, alone in zip(read_rows(tmp_path / exchange), read_rows(tmp_path / "single"), strict=True):
            assert row["loss"] == pytest.approx(alone["loss"], rel=1e-5)
            assert row["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)


def test_the_loss_is_the_mean_over_the_labelled_tokens_of_all_packs_of_a_step(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("ab" * 20)
    (tmp_path / "text" / "b.txt").write_text("c")  # packs differ in their number of labelled tokens
    data = {"source": "text", "path": str(tmp_path / "text")}
    train({**small(tmp_path / "run", data=data, loop={"steps": 1, "accumulation": 3}), "context": 23})

    config = TrainConfig.from_dict(small(tmp_path))
    model_config = replace(config.model, vocab_size=320)
    model = Decoder(model_config, flashcp.ContextParallel())
    text = [*b"ab" * 20, 256, *b"c", 256] * 2
    losses = []
    for start, lengths in ((0, [23]), (23, [18, 2, 3]), (46, [23])):
        tokens = torch.tensor(text[start : start + 23])
        labels = tokens.roll(-1)
        labels[torch.tensor(lengths).cumsum(0) - 1] = NO_LABEL
        positions = torch.cat([torch.arange(length) for length in lengths])
        logits = model(tokens, positions, flashcp.plan(lengths, 1))
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    loss = torch.cat(losses).sum() / (22 + 20 + 22)
    loss.backward()
    norm = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]).norm()

    (row,) = read_rows(tmp_path / "run")
    assert row["labelled_tokens"] == 22 + 20 + 22
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_losses_fall_and_the_summary_tells_the_run(tmp_path: Path) -> None:
    summary = train(small(tmp_path / "run", loop={"steps": 12, "accumulation": 1}, optimizer={"lr": 3e-3}))
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["losses"] == [row["loss"] for row in read_rows(tmp_path / "run")]
    assert summary["final_loss"] < summary["losses"][0] - 0.3
    assert summary["steps"] == len(summary["losses"]) == 12
    assert summary["tokens"] == 12 * 515
    attention_ms = [row["attention_ms"] for row in read_rows(tmp_path / "run")]
    assert attention_ms != sorted(attention_ms)  # each step's own time, not the sum so far
    assert summary["step_ms"]["p20"] <= summary["step_ms"]["median"] <= summary["step_ms"]["p80"]
    assert (summary["world_size"], summary["imbalance"], summary["saving"]) == (1, 1.0, 0.0)
    assert summary["versions"]["torch"] == torch.__version__
    assert TrainConfig.from_dict(summary["config"]).loop.steps == 12


def interrupt_and_resume(out: Path, world_size: int, **sections: dict[str, Any]) -> Path:
    """Die in the fourth step, with a checkpoint of the third; then a new run goes on to the sixth."""
    run_ranks(train_and_die_at, world_size, small(out, checkpoint={"every": 3}, **sections), 4)
    assert len(read_rows(out)) == 4  # one step past the checkpoint was done and is lost
    run_ranks(train, world_size, small(out, checkpoint={"every": 3, "resume": "latest"}, **sections))
    return out / "checkpoints" / "step_00000006"


def train_and_die_at(config: dict[str, Any], step: int) -> None:
    """Train until a step is logged, then fail as a run does when its machine goes."""
    from flashcp.train import loop

    real_steps = loop.Trainer.steps

    def steps(trainer: loop.Trainer) -> Any:
        for row in real_steps(trainer):
            yield row
            if row["step"] == step:
                raise RuntimeError("the machine is gone")

    loop.Trainer.steps = steps  # type: ignore[method-assign]
    try:
        train(config)
    except RuntimeError as error:
        assert str(error) == "the machine is gone"  # noqa: PT017
    else:
        raise AssertionError("the run was to be interrupted")
    finally:
        loop.Trainer.steps = real_steps  # type: ignore[method-assign]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("overflow", ["truncate", "carry"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(world_size: int, overflow: str, tmp_path: Path) -> None:
    data = {"overflow": overflow}
    run_ranks(train, world_size, small(tmp_path / "whole", data=data, checkpoint={"every": 3}))
    resumed = interrupt_and_resume(tmp_path / "resumed", world_size, data=data)
    assert_same_checkpoint(tmp_path / "whole" / "checkpoints" / "step_00000006", resumed)
    rows = [without(read_rows(tmp_path / name), TIMES) for name in ("whole", "resumed")]
    assert rows[0] == rows[1]
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "resumed")]
    assert summaries[0]["losses"] == summaries[1]["losses"]


def test_a_run_resumes_on_another_number_of_ranks(single: list[dict[str, Any]], tmp_path: Path) -> None:
    train(small(tmp_path / "run", checkpoint={"every": 4}, loop={"steps": 6}))
    (tmp_path / "run" / "summary.json").unlink()
    run_ranks(train, 2, small(tmp_path / "run", checkpoint={"resume": "latest"}))
    losses = [row["loss"] for row in read_rows(tmp_path / "run")]
    assert losses == pytest.approx([row["loss"] for row in single], rel=1e-5)


def test_old_checkpoints_go_and_none_is_half_written(tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "checkpoints" / "unfinished_step_00000002").mkdir(parents=True)
    (out / "checkpoints" / "unfinished_step_00000002" / "left_over").touch()
    train(small(out, checkpoint={"every": 1, "keep": 3}, loop={"steps": 4}))
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == ["step_00000002", "step_00000003", "step_00000004"]
    assert not (out / "checkpoints" / "step_00000002" / "left_over").exists()


def test_a_run_ends_with_its_documents(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("to be or not to be " * 100)  # 1901 tokens: 3 windows of 515
    data = {"source": "text", "path": str(tmp_path / "text"), "epochs": 1}
    summary = train(small(tmp_path / "run", data=data, loop={"accumulation": 1}))
    assert summary is not None
    assert summary["steps"] == 3
    with pytest.raises(ValueError, match="epochs=1: the documents fill 3 batches of batch_windows=1 windows"):
        train(small(tmp_path / "never", data=data, loop={"accumulation": 4}))
    assert not (tmp_path / "never").exists()


def test_bf16_follows_fp32(single: list[dict[str, Any]], tmp_path: Path) -> None:
    train(small(tmp_path / "run", loop={"precision": "bf16"}, model={"checkpoint_activations": True}))
    losses = [row["loss"] for row in read_rows(tmp_path / "run")]
    assert losses == pytest.approx([row["loss"] for row in single], rel=1e-2)
    assert losses != pytest.approx([row["loss"] for row in single], rel=1e-6)
