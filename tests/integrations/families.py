"""Families of Transformers' models, small and with random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

VOCABULARY = 64
WINDOW = 7
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MIX = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 4,
}  # fmt: skip

# name -> the model's class, and what its configuration has besides SIZES
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, **MIX}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_window": ("Mistral", {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2", {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, **MIX}),
    "gemma3": ("Gemma3", {"query_pre_attn_scalar": 8, **MIX}),
    "gemma4": ("Gemma4", {**MIX, "global_head_dim": 16, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2,
                          "vocab_size_per_layer_input": VOCABULARY, "num_hidden_layers": 4,
                          "layer_types": 2 * MIX["layer_types"]}),
    "gpt_oss": ("GptOss", {**EXPERTS, **MIX}),
    "mixtral": ("Mixtral", EXPERTS),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", MIX),
    "deepseek_v3": ("DeepseekV3", LATENT),
    "llama4": ("Llama4", {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": WINDOW,
                          "intermediate_size_mlp": 48, **EXPERTS}),
}  # fmt: skip


def make_model(family: str, attention: str) -> nn.Module:
    """The same weights whenever it is called. attention: the name of an implementation."""
    name, own = FAMILIES[family]
    text = {"Gemma3": "TextConfig", "Gemma4": "TextConfig", "Llama4": "TextConfig"}.get(name, "Config")
    config = getattr(hf, f"{name}{text}")(**{**SIZES, **own})
    torch.manual_seed(0)
    model: nn.Module = getattr(hf, f"{name}ForCausalLM")._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)  # norms and sinks are no constants
    return model.train()
