"""Gemma 3 with images over ranks: blocks of image tokens that see each other, features of a vision tower."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers as hf
from torch import Tensor, nn

import flashcp
from flashcp.integrations.transformers import Collator, install, take_own_features
from flashcp.integrations.transformers.images import block_masks
from tests.integrations.families import MIX, SIZES, VOCABULARY
from tests.integrations.training import Answer, differences, gradients_of
from tests.ranks import run_ranks

IMAGE, OF_AN_IMAGE = VOCABULARY - 1, 4
DOCUMENTS = ((5, 1, 9), (20,), (3, 30, 2, 4))
"""Text tokens before, between and behind images."""


def make_model(attention: str) -> nn.Module:
    text = {**SIZES, "query_pre_attn_scalar": 8, **MIX}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    images = {"image_token_id": IMAGE, "boi_token_index": 61, "eoi_token_index": 62}
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=OF_AN_IMAGE, **images)
    torch.manual_seed(0)
    model: nn.Module = hf.Gemma3ForConditionalGeneration._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()


def documents() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for parts in DOCUMENTS:
        text = [torch.randint(3, 60, (part,), generator=generator) for part in parts]
        image = torch.full((OF_AN_IMAGE,), IMAGE)
        ids = torch.cat([text[0], *(one for part in text[1:] for one in (image, part))])
        pixels = torch.randn(len(parts) - 1, 3, 8, 8, generator=generator)
        made.append({"input_ids": ids, "pixel_values": pixels})
    return made


def flatten(features: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What a user's collator does: documents one after the other, images of all."""
    ids = torch.cat([one["input_ids"] for one in features])
    ends = torch.tensor([0, *(len(one["input_ids"]) for one in features)]).cumsum(0)
    labels = torch.where(ids == IMAGE, -100, ids)
    return {"input_ids": ids[None], "labels": labels[None], "token_type_ids": (ids == IMAGE).long()[None],
            "cu_seq_lens_q": ends, "pixel_values": torch.cat([one["pixel_values"] for one in features])}  # fmt: skip


def alone() -> Answer:
    model = make_model("eager")
    given = [flatten([one]) for one in documents()]
    count = sum(int((one["labels"][0, 1:] != -100).sum()) for one in given)
    loss = torch.zeros(())
    for one in given:
        del one["cu_seq_lens_q"]
        if not len(one["pixel_values"]):
            del one["pixel_values"]
        loss = loss + model(**one, use_cache=False, num_items_in_batch=count).loss
    loss.backward()
    return loss.item(), gradients_of(model)


def over_ranks() -> Answer:
    cp = flashcp.ContextParallel()
    model = make_model(install(cp))
    take_own_features(model)
    batch = Collator(cp, flatten, config=model.config, blocks="token_type_ids")(documents())
    loss = model(**batch).loss
    loss.backward()
    gradients = gradients_of(model)
    for summed in (loss := loss.detach(), *gradients.values()):
        dist.all_reduce(summed)
    return loss.item(), gradients


@pytest.mark.parametrize("ranks", [2, 4])
def test_gemma_3_with_images(ranks: int) -> None:
    answer = run_ranks(over_ranks, ranks)[0]
    assert {name: error for name, error in differences(answer, alone()).items() if error > 1e-4} == {}


def test_a_pack_without_images_between_others() -> None:
    cp = flashcp.ContextParallel()
    model = make_model(install(cp))
    take_own_features(model)

    def inner(features: list[Any]) -> dict[str, Tensor]:
        batch = flatten(features)
        del batch["pixel_values"]
        return batch

    batch = Collator(cp, inner, config=model.config, blocks="token_type_ids")(documents()[1:2])
    found = model(**batch).loss
    del batch["token_type_ids"]
    assert torch.equal(found, model(**batch).loss)


def test_blocks_are_runs_of_marks_inside_a_document() -> None:
    marks = np.array([1, 1, 0, 1, 1, 1, 0, 2, 1])
    blocks = [mask.blocks for mask in block_masks(marks, np.array([4, 3, 2]))]
    assert blocks == [((0, 2), (3, 4)), ((0, 2),), ((1, 2),)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": None}, "mask function blockwise_overlay.<locals>.inner_mask beside a plan: expected blocks"),
        ({"config": None}, "pixel_values without an image_token_id: expected config=model.config"),
        ({"images": 2}, "8 image features, 20 image tokens in the pack: expected as many"),
        ({"window": 3}, "a block of 4 rows in a layer that looks 3 back: expected no more"),
    ],
)
def test_images_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    cp = flashcp.ContextParallel()
    model = make_model(install(cp))
    take_own_features(model)
    changes = {"config": model.config, "blocks": "token_type_ids", **changes}
    images, window = changes.pop("images", None), changes.pop("window", None)
    if window:
        model.config.text_config.sliding_window = window
        for layer in model.model.language_model.layers:
            layer.self_attn.sliding_window = layer.self_attn.sliding_window and window

    def inner(features: list[Any]) -> dict[str, Tensor]:
        batch = flatten(features)
        return {**batch, "pixel_values": batch["pixel_values"][:images]}

    with pytest.raises(ValueError) as caught:  # noqa: PT011
        model(**Collator(cp, inner, **changes)(documents()))
    assert str(caught.value).startswith(message)
