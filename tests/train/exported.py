"""Decoders with all their weights drawn, in checkpoints that no run had to write."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import flashcp
from flashcp.train.checkpoint import Progress, save_checkpoint
from flashcp.train.data.files_read import FilesRead
from flashcp.train.data.sources import Files, whole_text
from flashcp.train.data.tokenizer import load_tokenizer
from flashcp.train.lineage import Lineage
from flashcp.train.model import Decoder
from flashcp.train.model_config import ModelConfig
from flashcp.train.optimizer import OptimizerConfig, build_optimizer
from flashcp.train.ranks import Ranks

MODEL = ModelConfig(layers=4, dim=48, heads=4, kv_heads=2, ffn_dim=96, vocab_size=320, norm_eps=3e-5, rope_theta=7e3)
MODELS = {
    "LlamaForCausalLM": MODEL,
    "MistralForCausalLM": replace(MODEL, window=5),
    "MinistralForCausalLM": replace(MODEL, window=5, full_every=2),
    "DeepseekV3ForCausalLM": replace(MODEL, latent=20, kv_heads=4),
}
CONTEXT = 64
DATA = {"tokenizer": "bytes", "end_token": "", "stored_lengths": False, "parse_special": False}


def saved(out: Path, model: ModelConfig, **data: str) -> tuple[Decoder, Path]:
    """A decoder whose weights are all drawn, and its checkpoint."""
    decoder = Decoder(model, flashcp.ContextParallel(), seed=1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in decoder.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=draw)
    data = {**DATA, **data}
    names = (data["tokenizer"], data["end_token"])
    identity = {
        "model": {name: value for name, value in vars(model).items() if name != "checkpoint_activations"},
        "data": {**data, "tokenizer_sha256": load_tokenizer(*names).digest},
        "run": {"context": CONTEXT},
    }
    lineage, alone = Lineage(out), Ranks(0, 1, torch.device("cpu"))
    optimizer = build_optimizer(decoder, OptimizerConfig())
    return decoder, save_checkpoint(
        lineage, 1, identity, decoder, optimizer, Progress(7), FilesRead(Files([], partial(whole_text, 1))), alone
    )


def a_tokenizer(file: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"to": 0, "be": 1, "<end>": 2}, unk_token="<end>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(file))
    return file
