"""Tokenizers: bytes and the tokenizers package."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tokenizers

from flashcp.experiments.cli.main import main
from flashcp.train.config import TrainConfig
from flashcp.train.data.tokenizer import load_tokenizer
from flashcp.train.run import run_in_turns
from tests.ranks import run_ranks
from tests.train.test_run import small, train


def test_bytes_and_an_end_mark() -> None:
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("aä").tolist() == [97, 0xC3, 0xA4, 256]
    assert tokenizer.encode("\ud800").tolist() == [ord("?"), 256]
    assert tokenizer.vocab_size == 257


@pytest.fixture
def words(tmp_path: Path) -> str:
    vocabulary = {"[UNK]": 0, "hello": 1, "world": 2, "<end>": 3, "<begin>": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", 4)]
    )
    path = tmp_path / "words.json"
    tokenizer.save(str(path))
    return str(path)


def test_a_file_of_the_tokenizers_package(words: str) -> None:
    plain = load_tokenizer(words)
    assert plain.vocab_size == 5
    assert plain.encode("hello there world").tolist() == [1, 0, 2]
    assert load_tokenizer(words, "<end>").encode("world").tolist() == [2, 3]


def test_stored_padding_and_truncation_do_not_count_unless_asked_for(words: str) -> None:
    stored = tokenizers.Tokenizer.from_file(words)
    stored.enable_padding(pad_id=3, pad_token="<end>", length=6)
    stored.enable_truncation(2)
    stored.save(words)
    plain = load_tokenizer(words, "<end>")
    assert plain.encode("hello hello world world").tolist() == [1, 1, 2, 2, 3]
    assert plain.encode("world").tolist() == [2, 3]  # no pad token is trained on
    (note,) = plain.notes
    assert note.endswith("words.json': its stored padding and truncation is switched off (data.stored_lengths)")
    as_stored = load_tokenizer(words, "<end>", stored_lengths=True)
    assert as_stored.encode("hello hello world world").tolist() == [1, 1, 3, 3, 3, 3, 3]
    assert not as_stored.notes
    assert not load_tokenizer("bytes").notes


def test_a_special_token_spelled_in_text_is_text(words: str) -> None:
    marked = tokenizers.Tokenizer.from_file(words)
    marked.add_special_tokens(["<end>"])
    marked.save(words)
    plain, parsed = load_tokenizer(words, "<end>"), load_tokenizer(words, "<end>", parse_special=True)
    assert plain.encode("hello <end> world").tolist() == [1, 0, 0, 0, 2, 3]  # < end > unknown
    assert parsed.encode("hello <end> world").tolist() == [1, 3, 2, 3]
    (note,) = plain.notes
    assert note.endswith("words.json': a special token in a document, such as '<end>', is text (data.parse_special)")
    assert not parsed.notes


@pytest.fixture
def noted(words: str, tmp_path: Path) -> dict[str, str]:
    """The data of a tokenizer of which padding, truncation and a mark do not count."""
    stored = tokenizers.Tokenizer.from_file(words)
    stored.enable_truncation(2)
    stored.add_special_tokens(["<end>"])
    stored.save(words)
    (tmp_path / "a.txt").write_text("hello world " * 500)
    return {"source": "text", "path": str(tmp_path / "a.txt"), "tokenizer": words}


def told(said: str) -> list[str]:
    return [line.partition(": ")[2] for line in said.splitlines() if line.startswith("data.tokenizer=")]


NOTES = [
    "its stored truncation is switched off (data.stored_lengths)",
    "a special token in a document, such as '<end>', is text (data.parse_special)",
]


def test_a_plan_says_once_what_does_not_count(noted: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"data={noted.pop('source')}", *(f"data.{key}={value}" for key, value in noted.items())]
    assert main(["plan", *words, "context=100", "windows=2", "world_size=2"]) == 0
    assert told(capsys.readouterr().err) == NOTES
    assert main(["plan", *words, "data.longest=1", "world_size=2"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_rank_0_of_a_run_says_once_what_does_not_count(
    ranks: int, noted: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path / "run", data=noted, loop={"steps": 2, "accumulation": 1})
    if ranks == 1:
        run_in_turns([TrainConfig.from_dict({**config, "out": str(tmp_path / name)}) for name in ("a", "b")])
    else:
        run_ranks(train, ranks, config, fresh=True)  # whose standard error is this test's
    assert told(capfd.readouterr().err) == NOTES


@pytest.mark.parametrize("path", ["/dev/zero", "pipe.json"])
def test_a_file_without_end_is_no_tokenizer(path: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"data\.tokenizer='.*': cannot be read .*(a device|a pipe), expected a file"):
        load_tokenizer(str(tmp_path / path))


def test_errors_name_the_field(words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.end_token='<eos>' is not in the vocabulary"):
        load_tokenizer(words, "<eos>")
    with pytest.raises(ValueError, match=r"data\.end_token='x': the bytes tokenizer has its own"):
        load_tokenizer("bytes", "x")
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(ValueError, match=r"data\.tokenizer='.*broken\.json': cannot be read as a tokenizers"):
        load_tokenizer(str(broken))
    with pytest.raises(ValueError, match=r"data\.tokenizer='nowhere\.json': cannot be read as .*No such file"):
        load_tokenizer("nowhere.json")


def test_text_that_has_no_tokens_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"hello": 0}, unk_token="[UNK]")).save(str(file))
    with pytest.raises(ValueError, match=r"^the tokenizer has no tokens for 'world': .*\[UNK\]"):
        load_tokenizer(str(file)).encode("world")
