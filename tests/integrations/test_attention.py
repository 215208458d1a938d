"""What a model's attention does with a plan, without one, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import create_causal_mask

import flashcp
from flashcp.integrations.transformers import Collator, install, layers_of
from tests.integrations.families import VOCABULARY, WINDOW, make_model
from tests.integrations.training import LENGTHS, documents
from tests.packs import relative_error
from tests.ranks import run_ranks

CAUSAL, NEAR = flashcp.Mask(), flashcp.Mask("window", WINDOW)


def test_names_that_transformers_takes_for_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="name='flashcp': expected one without 'flash'"):
        install(flashcp.ContextParallel(), "flashcp")


@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_falls_back(family: str, cache: str) -> None:
    prompt = torch.arange(3, 15)[None]
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "eos_token_id": -1}
    how["attention_mask"] = torch.ones_like(prompt)
    wanted = make_model(family, "eager").eval().generate(prompt, **how)
    found = make_model(family, install(flashcp.ContextParallel())).eval().generate(prompt, **how)
    assert found.tolist() == wanted.tolist()


def test_a_padded_batch_without_a_plan() -> None:
    ids, mask = torch.randint(3, VOCABULARY, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    wanted, found = (make_model("llama", name)(ids, attention_mask=mask).logits for name in ("sdpa", _name()))
    torch.testing.assert_close(found, wanted)


def test_training_without_a_plan_is_refused() -> None:
    for said in run_ranks(train_without_a_plan, 2):
        assert said.startswith("LlamaAttention is trained without a plan: expected plan=... in the model's call")


def train_without_a_plan() -> str:
    with pytest.raises(ValueError, match="plan") as caught:
        make_model("llama", _name())(torch.arange(3, 15)[None])
    return str(caught.value)


# --- with a plan: every keyword is used or refused

Q, KV = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8)
PLAN = flashcp.plan([7, 5], 1)


def attend(**said: Any) -> Tensor:
    layer = make_model("llama", _name()).model.layers[0].self_attn
    given = {"plan": PLAN, "scaling": 0.3, "dropout": 0.0, "attention_mask": None, "query": Q, **said}
    mask, query = given.pop("attention_mask"), given.pop("query")
    out: Tensor = AttentionInterface()[_name()](layer, query, KV, KV, mask, **given)[0]
    return out


def mask(**how: Any) -> Any:
    config = make_model("llama", _name()).config
    given = how.pop("attention_mask", None)
    length = 12 if given is None else given.shape[1]
    return create_causal_mask(config, torch.zeros(1, length, 32), given, None, **how)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"dropout": 0.1}, "dropout=0.1 beside a plan: expected 0"),
        ({"position_bias": torch.zeros(1)}, "position_bias=tensor([0.]) beside a plan: expected none"),
        ({"logit_scale": 2.0}, "logit_scale=2.0 beside a plan: expected none, FlashCP does not compute it"),
        ({"cu_seq_lens_q": [0, 12]}, "cu_seq_lens_q=[0, 12] beside a plan: expected none"),
        ({"seq_idx": [0]}, "seq_idx=[0] beside a plan: expected none"),
        ({"output_attentions": True}, "output_attentions=True beside a plan: expected none"),
        ({"is_causal": False}, "is_causal=False beside a plan: expected causal layers"),
        ({"query": torch.cat((Q, Q))}, "a batch of 2 rows beside a plan: expected one, the pack's"),
        ({"attention_mask": torch.zeros(1, 1, 12, 12)}, "attention_mask [1, 1, 12, 12] beside a plan: expected none"),
        ({"sliding_window": 4, "attention_mask": mask}, "the layer's mask looks None rows back, its attention 4"),
        ({"attention_mask": lambda: mask(attention_mask=torch.tensor([[0] + [1] * 11]))}, "attention_mask has zeros"),
        ({"attention_mask": lambda: mask(attention_mask=torch.ones(1, 20))}, "attention over 20 keys, 12 rows"),
        ({"attention_mask": lambda: mask(or_mask_function=lambda b, h, q, k: k > 3)},
         "mask function <lambda>.<locals>.<lambda> beside a plan: expected causal, windows, chunks and packed"),
        ({"attention_mask": lambda: mask(block_sequence_ids=torch.zeros(1, 12))},
         "mask function blockwise_overlay.<locals>.inner_mask beside a plan: expected blocks in the plan's masks"),
        ({"plan": "none", "attention_mask": mask}, "plan is a str: expected a ShardingPlan"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused_by_name(said: dict[str, Any], message: str) -> None:
    if isinstance(said.get("attention_mask"), Callable):  # type: ignore[arg-type]
        said = {**said, "attention_mask": said["attention_mask"]()}
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        attend(**said)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_mask_that_is_not_made_says_whose_attention_it_is() -> None:
    made = mask()
    assert made[:, :, -12:] is made[:] is made
    for use in (lambda: made[:, :, 1:], lambda: made[0], lambda: made + Q, lambda: Q * made, lambda: torch.tril(made)):
        with pytest.raises(ValueError, match="this model's attention is its own, or changes its mask: expected"):
            use()
    with pytest.raises(AttributeError, match="this model's attention is its own"):
        made.to(torch.bool)


def test_keywords_that_say_nothing_to_attention_are_let_by() -> None:
    plain = attend()
    said = {"position_ids": torch.zeros(1, 12), "num_items_in_batch": 3, "output_attentions": False, "unknown": None}
    assert torch.equal(attend(attention_mask=mask(), **said), plain)


def test_scale_softcap_and_sinks_are_used() -> None:
    sinks = torch.randn(4)
    rows = [x[0].transpose(0, 1) for x in (Q, KV, KV)]
    wanted = flashcp.reference_attention(*rows, [7, 5], 0.3, softcap=1.5, sinks=sinks)  # type: ignore[misc, call-overload]
    assert relative_error(attend(softcap=1.5, s_aux=sinks)[0], wanted) < 1e-6


def _name() -> str:
    return install(flashcp.ContextParallel())


# --- layers


@pytest.mark.parametrize(
    ("family", "mix"),
    [
        ("llama", None),
        ("mistral", None),
        ("mistral_window", [(NEAR, 2)]),
        ("gemma2", [(NEAR, 1), (CAUSAL, 1)]),
        ("llama4", [(flashcp.Mask("chunk", WINDOW), 1), (CAUSAL, 1)]),
    ],
)
def test_the_mix_of_layers_is_read(family: str, mix: Any) -> None:
    config = make_model(family, "eager").config
    assert layers_of(config) == mix
    assert Collator(flashcp.ContextParallel(), config=config)(documents())["plan"].layers == (
        () if mix is None else flashcp.plan(LENGTHS, 1, layers=mix).layers
    )


def test_layers_that_are_no_attention_are_refused() -> None:
    config = make_model("qwen3", "eager").config
    config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="layer_types holds 'linear_attention': expected full_attention, sliding"):
        layers_of(config)


# --- through whole models


def test_ranks_that_got_other_tokens_hear_of_it() -> None:
    said = run_ranks(other_tokens, 2)
    assert all("ranks disagree on plan" in one for one in said), said


def other_tokens() -> str:
    """Documents of the same lengths, other tokens on each rank."""
    cp = flashcp.ContextParallel()
    model = make_model("llama", install(cp))
    with pytest.raises(RuntimeError) as caught:
        model(**Collator(cp)(documents(dist.get_rank())))
    return str(caught.value)
