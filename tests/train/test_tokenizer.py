"""Tokenizers: bytes and the tokenizers package."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers

from flashcp.train.data.tokenizer import load_tokenizer


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
