"""A checkpoint as Transformers loads models: model.safetensors, config.json and, of a `tokenizers` file, its files.

A decoder is written as the class of Transformers that computes the same, and refused where there is none:

    LlamaForCausalLM        every layer sees all before it
    MistralForCausalLM      model.window
    MinistralForCausalLM    model.window and model.full_every
    DeepseekV3ForCausalLM   model.latent, all its layers dense
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flashcp
from flashcp.schema import read_dataclass
from flashcp.sharding.values import first_line, read_whole
from flashcp.train.checkpoint import read_state, verified
from flashcp.train.checksums import IDENTITY
from flashcp.train.data.sources import needed
from flashcp.train.data.tokenizer import FileTokenizer, Tokenizer, load_tokenizer
from flashcp.train.lineage import UNFINISHED, find_latest
from flashcp.train.model import Decoder
from flashcp.train.model_config import ModelConfig
from flashcp.train.ranks import Ranks
from flashcp.train.summary import write_json

NO_TOKENIZER = "none"
DEEPSEEK_LATENT_EPS = 1e-6  # of its latent's norm, which no configuration sets
MODEL = {"embedding": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.wkv": "self_attn.kv_a_proj_with_mqa",
    "attention.latent_norm": "self_attn.kv_a_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}


class Exported(NamedTuple):
    """What was written. kind: the class of Transformers."""

    kind: str
    parameters: int
    step: int
    tokenizer: bool


def export(checkpoint: Path, out: Path, tokenizer: str = "") -> Exported:
    """Write the folder `out`, whole or not at all.

    checkpoint: a step_* folder, or that of a run, whose latest is meant. tokenizer: where the run's tokenizers file is
    now; empty: where it was; `none`: without. Raises ValueError, in one line, for what cannot be read, written or said.
    """
    library = needed("safetensors.torch", "flashcp export")
    if out.exists() or out.is_symlink():
        raise ValueError(f"out={str(out)!r} exists already: expected a folder that is to be made")
    path = checkpoint if (checkpoint / IDENTITY).is_file() else find_latest(checkpoint)
    if path is None:
        raise ValueError(f"{checkpoint}: no checkpoint there; expected a step_* folder, or a run's with checkpoints")
    saved = verified(path, Ranks(0, 1, torch.device("cpu")))
    try:
        model = read_dataclass(ModelConfig, saved["model"], "model")
        data = dict(saved["data"])
        context = read_whole("context", saved["run"]["context"])
        step = read_whole("step", saved["progress"]["step"], least=0)
        reads = _tokenizer(data, tokenizer)
        end_id = reads.end_id if reads else None
    except (KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path}: {IDENTITY} lacks {error}") from error
    config = config_of(model, context, end_id)
    weights = renamed(read_weights(path, model), model)
    unfinished = out.with_name(f"{UNFINISHED}{out.name}")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # what a killed export left
        unfinished.mkdir(parents=True)
        library.save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
        write_json(unfinished / "config.json", config)
        if isinstance(reads, FileTokenizer):
            (unfinished / "tokenizer.json").write_text(reads.to_json(), encoding="utf-8")
            end = {"eos_token": data["end_token"]} if data["end_token"] else {}
            kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
            write_json(unfinished / "tokenizer_config.json", {**kind, **end, "model_max_length": context})
        os.rename(unfinished, out)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not isinstance(error, OSError | needed("safetensors", "").SafetensorError):
            raise
        raise ValueError(f"out={str(out)!r}: cannot be written ({first_line(error)})") from error
    count = sum(weight.numel() for weight in weights.values())
    return Exported(config["architectures"][0], count, step, isinstance(reads, FileTokenizer))


def config_of(model: ModelConfig, context: int, end_id: int | None) -> dict[str, Any]:
    """config.json. Raises ValueError, naming the setting, where no class of Transformers computes the same."""
    model.check()
    for name in ("chunk", "softcap", "sinks"):
        if value := getattr(model, name):
            raise ValueError(f"model.{name}={value}: no class of Transformers has it in a decoder like this one")
    if model.latent and model.window:
        raise ValueError(f"model.latent={model.latent} with model.window={model.window}: DeepseekV3 has no window")
    head_dim = model.dim // model.heads
    more: dict[str, Any]
    kind, more = "llama", {"head_dim": head_dim, "mlp_bias": False}
    if model.window:
        kind, more = "mistral", {"head_dim": head_dim, "sliding_window": model.window}
    if model.full_every:
        of_layers = [any(model.limits(layer).values()) for layer in range(model.layers)]
        kind = "ministral"
        more["layer_types"] = ["sliding_attention" if narrow else "full_attention" for narrow in of_layers]
    if model.latent:
        kind, more = (
            "deepseek_v3",
            {
                "kv_lora_rank": model.latent,
                "q_lora_rank": None,
                **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), head_dim),
                "rope_interleave": False,
                "first_k_dense_replace": model.layers,
                "num_nextn_predict_layers": 0,
            },
        )
    return {
        "architectures": [f"{kind.title().replace('_', '')}ForCausalLM"],
        "model_type": kind,
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.ffn_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,  # Transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "max_position_embeddings": context,
        "tie_word_embeddings": model.tied_embeddings,
        "bos_token_id": None,
        "eos_token_id": end_id,
        "pad_token_id": None,
        "dtype": "float32",
        "torch_dtype": "float32",  # Transformers 4
        **more,
    }


def read_weights(path: Path, model: ModelConfig) -> dict[str, Tensor]:
    """The decoder's weights. Raises ValueError where the checkpoint's have other names, shapes or more than data."""
    cp = flashcp.ContextParallel()
    with torch.device("meta"):
        shapes = Decoder(model, cp).state_dict()
    weights = {name: torch.empty_like(shape, device="cpu") for name, shape in shapes.items()}
    read_state(path, {"model": weights})
    return weights


def renamed(weights: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """The weights under Transformers' names. What two share is there once, as Transformers expects it."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        place = name.removesuffix(".weight")
        if place.startswith("blocks."):
            _, layer, part = place.split(".", 2)
            if not (model.latent and part in ("attention.wk", "attention.wv")):
                found[f"model.layers.{layer}.{BLOCK[part]}.weight"] = weight
        elif not (place == "output" and model.tied_embeddings):
            found[f"{MODEL[place]}.weight"] = weight
    if model.latent:
        for number in range(model.layers):
            attention = f"model.layers.{number}.self_attn"
            # Each head's keys, then its values.
            parts = [weights[f"blocks.{number}.attention.{name}.weight"] for name in ("wk", "wv")]
            of_heads = torch.cat([part.unflatten(0, (model.heads, -1)) for part in parts], dim=1)
            found[f"{attention}.kv_b_proj.weight"] = of_heads.flatten(0, 1)
            # x / sqrt(mean(x^2) + eps) stays what it is where x^2 and eps shrink by the same factor.
            latent = found[f"{attention}.kv_a_proj_with_mqa.weight"][: model.latent]
            latent *= (DEEPSEEK_LATENT_EPS / model.norm_eps) ** 0.5
    return found


def _tokenizer(data: Mapping[str, Any], place: str) -> Tokenizer | None:
    """The run's, as it was."""
    if place == NO_TOKENIZER:
        return None
    name = place or data["tokenizer"]
    read = load_tokenizer(name, data["end_token"], data["stored_lengths"], data["parse_special"])
    if read.digest != data["tokenizer_sha256"]:
        raise ValueError(
            f"tokenizer={name!r}: not the one that the run had (another SHA-256); expected its file, or {NO_TOKENIZER}"
        )
    return read
