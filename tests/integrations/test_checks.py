"""What a model would compute wrongly over ranks without a word is an error of one line."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import flashcp
from flashcp.integrations.transformers import Collator, check_attention, install
from flashcp.integrations.transformers.layers import check_positions
from tests.integrations.families import SIZES, VOCABULARY, make_model
from tests.integrations.training import PATIENT_S, documents
from tests.ranks import run_ranks

GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
WIDE = {name: size for name, size in SIZES.items() if name != "head_dim"}


def checked(model: nn.Module) -> Any:
    """A model whose calls are checked, and a batch for it."""
    cp = flashcp.ContextParallel()
    install(cp)
    check_attention(model, cp)
    return model, Collator(cp)(documents())


def attends_otherwise() -> nn.Module:
    model = make_model("llama", install(flashcp.ContextParallel()))
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    return model


def attends_in_part() -> nn.Module:
    model = make_model("llama", install(flashcp.ContextParallel()))
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)  # type: ignore[union-attr]
    return model


def swallows_the_plan() -> nn.Module:
    model = hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(**GPT))
    model.set_attn_implementation(install(flashcp.ContextParallel()))
    return model


def drops_keywords() -> nn.Module:
    config = hf.StableLmConfig(**WIDE)
    return hf.StableLmForCausalLM._from_config(config, attn_implementation=install(flashcp.ContextParallel()))


@pytest.mark.parametrize(
    ("make", "calls", "name"),
    [
        (attends_otherwise, 0, "sdpa"),
        (attends_in_part, 1, "context_parallel"),
        (swallows_the_plan, 0, "eager"),
        (drops_keywords, 0, "context_parallel"),
    ],
)
def test_models_that_do_not_attend_through_flashcp(make: Callable[[], nn.Module], calls: int, name: str) -> None:
    model, batch = checked(make().eval())
    with pytest.raises(ValueError, match="through FlashCP") as caught, torch.no_grad():
        model(**batch)
    assert str(caught.value) == (
        f"the model did not attend through FlashCP: {calls} of 2 layers did, its attention is '{name}'; expected "
        "install(cp), and a model that hands plan= to its attention"
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_models_that_do_attend_are_let_by(compiled: bool) -> None:
    assert run_ranks(let_by, 2, compiled, timeout_s=PATIENT_S) == [True, True]


def let_by(compiled: bool) -> bool:
    model, batch = checked(make_model("llama", install(flashcp.ContextParallel())))
    wanted = make_model("llama", model.config._attn_implementation)(**batch).loss
    called = torch.compile(model, backend="aot_eager") if compiled else model
    found = called(**batch).loss
    model.eval()(torch.arange(3, 9)[None])  # without a plan nothing is asked
    return torch.allclose(found, wanted)


# --- positions

LONG, DYNAMIC = ({"rope_type": "longrope", "original_max_position_embeddings": 40}, {"rope_type": "dynamic"})


def config(**said: Any) -> Any:
    made = SimpleNamespace(max_position_embeddings=40, **said)
    made.get_text_config = lambda: made
    return made


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ({"rope_parameters": LONG}, "longrope"),
        ({"rope_parameters": DYNAMIC}, "dynamic"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "default"}, "full_attention": LONG}}, "longrope"),
    ],
)
def test_angles_of_the_longest_document(said: dict[str, Any], kind: str) -> None:
    check_positions(config(**said), flashcp.plan([40, 40, 40], 2))
    with pytest.raises(ValueError, match=f"a document of 41 tokens, rope_type='{kind}': expected no more than 40"):
        check_positions(config(**said), flashcp.plan([40, 41], 2))


@pytest.mark.parametrize(("lengths", "legal"), [([31, 20], True), ([32, 20], False), ([30, 20, 30], False)])
def test_temperatures_of_rows(lengths: list[int], legal: bool) -> None:
    llama4 = config(attn_temperature_tuning=True, floor_scale=32, no_rope_layers=[1, 0])
    plan = flashcp.plan(lengths, 2)
    if legal:
        check_positions(llama4, plan)
    else:
        with pytest.raises(ValueError, match=r"attn_temperature_tuning with a document of .* than floor_scale=32"):
            check_positions(llama4, plan)
    check_positions(config(attn_temperature_tuning=True, floor_scale=32, no_rope_layers=[1, 1]), plan)


def test_positions_are_checked_in_every_call() -> None:
    model = make_model("llama4", install(flashcp.ContextParallel()))
    model.config.floor_scale, model.config.no_rope_layers = 64, [1, 0]
    model, batch = checked(model)
    with pytest.raises(ValueError, match="attn_temperature_tuning with a document of 64 tokens"):
        model(**batch)


# --- losses


def test_auxiliary_losses_that_ranks_would_add_up() -> None:
    sizes = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
    model = hf.MixtralForCausalLM._from_config(
        hf.MixtralConfig(**sizes), attn_implementation=install(flashcp.ContextParallel())
    )
    model, batch = checked(model)
    assert model(**batch).loss > 0
    with pytest.raises(ValueError, match=r"output_router_logits with router_aux_loss_coef=0\.5: expected 0"):
        model(**batch, output_router_logits=True)
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match=r"output_router_logits with router_aux_loss_coef=0\.5: expected 0"):
        model(**batch)
    del batch["labels"]
    assert model(**batch).aux_loss > 0
