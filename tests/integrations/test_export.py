"""Transformers loads what `flashcp export` writes, and answers as the trainer's decoder does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flashcp
from flashcp.train.export import export
from tests.train.exported import MODEL, MODELS, a_tokenizer, saved


@pytest.mark.parametrize(("kind", "tied"), [*((kind, False) for kind in MODELS), ("LlamaForCausalLM", True)])
def test_transformers_answers_with_the_same_logits(kind: str, tied: bool, tmp_path: Path) -> None:
    decoder, path = saved(tmp_path / "run", replace(MODELS[kind], tied_embeddings=tied))
    assert export(path, tmp_path / "out").kind == kind
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model).__name__ == kind
    assert not any(told.values()), told  # every name has its place, and every place its weight
    tokens = torch.randint(320, (23,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = decoder(tokens, torch.arange(23), flashcp.plan([23], 1, layers=MODELS[kind].mix()))
        there = model(tokens[None]).logits[0]
    assert (logits - there).abs().max() < 1e-5 * logits.abs().max()


def test_transformers_reads_the_tokenizer(tmp_path: Path) -> None:
    _, path = saved(tmp_path / "run", MODEL, tokenizer=str(a_tokenizer(tmp_path / "words.json")), end_token="<end>")
    export(path, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer("to be")["input_ids"], tokenizer.eos_token_id) == ([0, 1], 2)
