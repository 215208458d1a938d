"""The decoder: documents do not see each other, positions are per document, options change no numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import flashcp
from flashcp.train.attention import Rotary, rotate
from flashcp.train.data.windows import NO_LABEL
from flashcp.train.model import Decoder
from flashcp.train.model_config import ModelConfig

SMALL = ModelConfig(layers=2, dim=32, heads=4, kv_heads=2, vocab_size=50)


def alone(model: ModelConfig = SMALL, seed: int = 0) -> Decoder:
    return Decoder(model, flashcp.ContextParallel(), seed)


def pack(*lengths: int) -> tuple[Tensor, Tensor, flashcp.ShardingPlan]:
    tokens = torch.randint(SMALL.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    position_ids = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))
    return tokens, position_ids, flashcp.plan(list(lengths), 1)


def test_a_pack_gives_what_its_documents_give_alone() -> None:
    model = alone()
    tokens, position_ids, plan = pack(7, 1, 12)
    together = model(tokens, position_ids, plan)
    parts = [model(part, torch.arange(len(part)), flashcp.plan([len(part)], 1)) for part in tokens.split([7, 1, 12])]
    torch.testing.assert_close(together, torch.cat(parts), rtol=1e-5, atol=1e-6)


def test_a_token_changes_what_follows_in_its_document_and_nothing_else() -> None:
    model = alone()
    tokens, position_ids, plan = pack(6, 6)
    changed = tokens.clone()
    changed[3] = (changed[3] + 1) % SMALL.vocab_size
    same = (model(tokens, position_ids, plan) == model(changed, position_ids, plan)).all(dim=1)
    assert same.tolist() == [True] * 3 + [False] * 3 + [True] * 6


def test_rotary_turns_pairs_by_position() -> None:
    head_dim, theta = 8, 100.0
    x_THE = torch.randn(5, 2, head_dim, dtype=torch.float64)
    position_ids = torch.tensor([0, 1, 2, 0, 7])
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    pairs = torch.complex(x_THE[..., :4], x_THE[..., 4:])
    turned = pairs * torch.polar(torch.ones(5, 1, 4, dtype=torch.float64), position_ids[:, None, None] * frequency)
    got = rotate(x_THE.float(), Rotary(head_dim, theta)(position_ids))
    torch.testing.assert_close(got.double(), torch.cat((turned.real, turned.imag), -1), rtol=1e-5, atol=1e-5)


def test_positions_matter_only_by_their_distance() -> None:
    model = alone()
    with torch.no_grad():  # fresh weights attend almost evenly, wherever a token is
        for block in model.blocks:
            block.attention.wq.weight.mul_(30)
            block.attention.wk.weight.mul_(30)
    tokens, position_ids, plan = pack(9)
    here, moved, stretched = (model(tokens, ids, plan) for ids in (position_ids, position_ids + 100, position_ids * 2))
    torch.testing.assert_close(here, moved, rtol=1e-3, atol=1e-4)
    assert (here - stretched).abs().max() > 1e-3


def test_loss_sums_over_labelled_tokens() -> None:
    model = alone()
    tokens, position_ids, plan = pack(5)
    labels = torch.tensor([3, NO_LABEL, 7, 1, NO_LABEL])
    log_probability = model(tokens, position_ids, plan).log_softmax(-1)
    expected = -sum(log_probability[row, labels[row]] for row in (0, 2, 3))
    torch.testing.assert_close(model.loss(tokens, labels, position_ids, plan), expected)


def test_a_seed_fixes_the_weights() -> None:
    first, again, other = (alone(seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


@pytest.mark.parametrize("tied", [False, True])
def test_activation_checkpointing_changes_no_gradient(tied: bool) -> None:
    tokens, position_ids, plan = pack(6, 5)
    gradients = []
    for checkpointing in (False, True):
        config = replace(SMALL, tied_embeddings=tied, checkpoint_activations=checkpointing)
        model = alone(config)
        model.loss(tokens, tokens.roll(-1), position_ids, plan).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    assert ("output.weight" in gradients[0]) is not tied
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert gradient.abs().max() > 0
        assert torch.equal(gradient, gradients[1][name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, r"model\.layers=0: expected a whole number >= 1"),
        ({"ffn_dim": -1}, r"model\.ffn_dim=-1: expected a whole number >= 0"),
        ({"dim": 30}, r"model\.dim=30: expected an even multiple of model\.heads=4"),
        ({"dim": 36}, r"model\.dim=36: expected an even multiple of model\.heads=4"),
        ({"kv_heads": 3}, r"model\.heads=4: expected a multiple of model\.kv_heads=3"),
    ],
)
def test_sizes_that_make_no_model(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        alone(replace(SMALL, **change))
