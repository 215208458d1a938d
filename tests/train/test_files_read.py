"""A resumed run reads on in the documents that its checkpoint's run read, and all ranks read the same."""

from __future__ import annotations

import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import tokenizers
import torch.distributed as dist

from flashcp.train.data.files_read import FilesRead
from flashcp.train.data.sources import DataConfig, open_source
from tests.ranks import RankError, run_ranks
from tests.train.test_run import read_rows, small, train

TEXTS = {"b.txt": "b" * 900, "c.txt": "c" * 1300, "d.txt": "d" * 900}  # three windows of 515 end in c.txt


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for name, content in TEXTS.items():
        (folder / name).write_text(content)
    return folder


def part(text: Path, steps: int, **checkpoint: Any) -> dict[str, Any]:
    data = {"source": "text", "path": str(text)}
    loop = {"steps": steps, "accumulation": 1}
    return small(text.parent / "run", data=data, loop=loop, checkpoint={"every": 3, **checkpoint})


def test_the_checkpoint_names_files_and_what_was_read_of_them(text: Path) -> None:
    train(part(text, 3))
    written = json.loads((text.parent / "run/checkpoints/step_00000003/identity.json").read_text())["documents"]
    assert [(Path(name).name, size, bool(digest)) for name, size, digest in written] == [
        ("b.txt", 900, True),
        ("c.txt", 1300, True),
        ("d.txt", 900, False),  # not read yet
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "a" * 100, r"a\.txt: a new file"),
        ("e.txt", "e" * 100, r"e\.txt: a new file"),
        ("b.txt", "x" * 900, r"b\.txt: other content \(another SHA-256\)"),
        ("c.txt", "c" * 1299 + "x", r"c\.txt: other content"),
        ("d.txt", "d" * 901, r"d\.txt: of another size"),
        ("b.txt", None, r"b\.txt: gone"),
    ],
)
def test_other_files_are_refused_by_name(name: str, content: str | None, message: str, text: Path) -> None:
    train(part(text, 3))
    (text / name).unlink() if content is None else (text / name).write_text(content)
    before = read_rows(text.parent / "run")
    match = rf"^checkpoint .*step_00000003: the documents changed: .*{message}.*; .*on_changed_data=go_on goes on"
    with pytest.raises(ValueError, match=match):
        train(part(text, 4, resume="latest"))
    assert read_rows(text.parent / "run") == before


def letters_of_step_5(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The letters that the fifth step trains on."""
    from flashcp.train.loop import Trainer

    seen: set[str] = set()
    real = Trainer.learn

    def step(self: Trainer, packs: Any) -> Any:
        if self.progress.step == 5:
            seen.update(chr(token) for pack in packs for token in pack.tokens.tolist() if token < 256)
        return real(self, packs)

    monkeypatch.setattr(Trainer, "learn", step)
    train(config)
    monkeypatch.undo()
    return seen


def test_going_on_all_the_same_reads_nothing_twice(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(part(text, 3))
    (text / "a.txt").write_text("a" * 600)
    (text / "b.txt").write_text("x" * 900)
    assert letters_of_step_5(part(text, 5, resume="latest", on_changed_data="go_on"), monkeypatch) == {"c", "d"}
    assert "a.txt: a new file); reading goes on in" in capsys.readouterr().err
    (text / "c.txt").write_text("y" * 1300)
    source = str(text.parent / "run/checkpoints/step_00000003")
    with pytest.raises(ValueError, match=r"c\.txt: other content .*: it was being read, so reading cannot go on"):
        train(part(text, 4, resume=source, on_changed_data="go_on"))


def test_unchanged_files_go_on_on_two_ranks_in_a_later_epoch(text: Path) -> None:
    run_ranks(train, 2, part(text, 9))
    run_ranks(train, 2, part(text, 12, resume="latest"))
    written = json.loads((text.parent / "run/checkpoints/step_00000012/identity.json").read_text())["documents"]
    assert all(digest for _, _, digest in written)


def test_another_tokenizer_of_the_same_name_is_refused(text: Path) -> None:
    def save(**more: int) -> None:
        vocabulary = {"[UNK]": 0, "b": 1, "c": 2, **more}
        model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
        tokenizer.save(str(text.parent / "words.json"))

    def config(steps: int, **checkpoint: Any) -> dict[str, Any]:
        run = part(text, steps, **checkpoint)
        return {**run, "data": {**run["data"], "tokenizer": str(text.parent / "words.json")}}

    save(d=3)
    train(config(3))
    save(e=3)
    with pytest.raises(
        ValueError, match=r"another run: data\.tokenizer_sha256 is '[0-9a-f]{64}' there and '[0-9a-f]{64}'"
    ):
        train(config(4, resume="latest"))


def with_own_text(config: dict[str, Any], root: str) -> None:
    """Each rank reads the folder of its number."""
    train({**config, "data": {**config["data"], "path": os.path.join(root, str(dist.get_rank()))}})


@pytest.mark.parametrize("data_parallel", [1, 3])
def test_a_rank_that_reads_other_text_is_named_on_all(data_parallel: int, tmp_path: Path) -> None:
    """Of equal lengths, so that plans agree; in replicas of one rank nothing else is compared."""
    for rank in range(3):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "a.txt").write_text("a" * 1600 + ("x" if rank == 1 else "a") + "a" * 2000)
    config = small(tmp_path / "run", data={"source": "text"}, loop={"accumulation": 2}, checkpoint={"every": 1})
    config |= {"batch_windows": data_parallel, "data_parallel": data_parallel}
    with pytest.raises(RankError) as refused:
        run_ranks(with_own_text, 3, config, str(tmp_path))
    step = 2 if data_parallel == 1 else 1
    assert str(refused.value).count(f"ValueError: step {step}: rank 1 read other text than rank 0, 2; expected") == 3
    assert not (tmp_path / "run/checkpoints" / f"step_{step:08d}").exists()


# --- files that are rewritten while a run reads them


def rewriting(config: dict[str, Any], file: str, content: str, at: int = 3) -> None:
    """Train on this rank; all ranks are as far as they read ahead when the file is rewritten amid a step."""
    from flashcp.train.loop import Trainer

    real = Trainer.learn

    def step(self: Trainer, packs: Any) -> Any:
        if self.progress.step == at:
            time.sleep(0.5)
            self.ranks.barrier()
            if self.ranks.rank == 0:
                Path(file).write_text(content)
            self.ranks.barrier()
        return real(self, packs)

    with patch.object(Trainer, "learn", step):
        train(config)


CHANGED = r"ValueError: /.*/{}: written to since this run read it; expected it to stay as it is\n"


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("content", ["x" * 900, "b" * 901])
def test_a_file_rewritten_after_it_was_read_ends_the_run_at_the_checkpoint(
    content: str, asynchronous: bool, text: Path
) -> None:
    """It would keep the digest of bytes that were not trained on."""
    with pytest.raises(RankError) as ended:
        run_ranks(rewriting, 2, part(text, 6, asynchronous=asynchronous), str(text / "b.txt"), content)
    assert len(re.findall(CHANGED.format("b.txt"), str(ended.value))) == 2
    assert not list((text.parent / "run/checkpoints").glob("*step*"))
    train(part(text, 3, resume="latest"))  # which finds none


@pytest.mark.parametrize("every", [0, 1])
def test_a_file_rewritten_between_two_readings_ends_the_run(every: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 600)
    data = {"source": "text", "path": str(tmp_path / "a.txt"), "prefetch": 1}
    loop = {"steps": 12, "accumulation": 1}
    config = small(tmp_path / "run", data=data, loop=loop, checkpoint={"every": every})
    with pytest.raises(RankError) as ended:
        run_ranks(rewriting, 2, config, str(tmp_path / "a.txt"), "x" * 600)
    assert len(re.findall(CHANGED.format("a.txt"), str(ended.value))) == 2
    assert 3 <= len(read_rows(tmp_path / "run")) < 8


def test_a_file_rewritten_after_a_resume_verified_it_ends_the_run(text: Path) -> None:
    train(part(text, 6))  # which ends in d.txt
    real = FilesRead.go_on

    def then_rewritten(*given: Any) -> Any:
        place = real(*given)
        (text / "c.txt").write_text("x" * 1300)
        return place

    match = r"c\.txt: written to since this run read it"
    with patch.object(FilesRead, "go_on", then_rewritten), pytest.raises(ValueError, match=match):
        train(part(text, 9, resume="latest"))


def test_a_file_rewritten_while_it_is_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n' * 100_000)
    texts = open_source(DataConfig(source="jsonl", path=str(file))).read(0, 0)
    assert next(texts) == "a"
    file.write_text('{"text": "b"}\n' * 100_000)
    with pytest.raises(ValueError, match=r"a\.jsonl: written to since"):
        list(texts)


def test_skipped_records_are_counted_also_over_a_resume(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ['{"text": null}' if number % 3 == 0 else json.dumps({"text": "w" * 90}) for number in range(60)]
    (text / "a.jsonl").write_text("\n".join(lines))

    def skipping(out: str, steps: int, **more: Any) -> list[dict[str, Any]]:
        data = {"source": "jsonl", "path": str(text / "a.jsonl"), "on_bad_record": "skip", **more.pop("data", {})}
        loop = {"steps": steps, "accumulation": 1}
        train(small(text.parent / out, data=data, loop=loop, checkpoint={"every": 3, **more}))
        return read_rows(text.parent / out)

    whole = skipping("whole", 14)
    assert "40 bad records were skipped (data.on_bad_record=skip)" in capsys.readouterr().err
    # n windows of 515 tokens reach into document ceil(515 n / 91), and a bad record comes before each two documents
    assert [row["skipped_records"] for row in whole] == [math.ceil(math.ceil(515 * n / 91) / 2) for n in range(1, 15)]
    skipping("halves", 3)
    assert [row["skipped_records"] for row in skipping("halves", 14, resume="latest")] == [
        row["skipped_records"] for row in whole
    ]
    assert json.loads((text.parent / "whole/summary.json").read_text())["skipped_records"] == 40
    with pytest.raises(ValueError, match=r"a\.jsonl:1: data\.text_field='text' holds null: expected text"):
        skipping("stopped", 3, data={"on_bad_record": "stop"})
