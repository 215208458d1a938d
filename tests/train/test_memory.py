"""What does not stay in memory: rows of logits, and activations that are kept elsewhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import flashcp
from flashcp.train.data.windows import NO_LABEL
from flashcp.train.model import Decoder
from flashcp.train.model_config import ModelConfig
from tests.packs import relative_error
from tests.ranks import run_cases

MODEL = ModelConfig(layers=2, dim=32, heads=4, kv_heads=2, vocab_size=500)
LENGTHS = (30, 7, 1, 45)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in (out if isinstance(out, tuple) else (out,))
                                              if isinstance(x, Tensor))])  # fmt: skip
        return out


def learnt(lengths: tuple[int, ...], transport: str = "auto", elsewhere: bool = False, **model: Any) -> Any:
    """Loss, gradients and the largest tensor. elsewhere: the backward has copies of what the forward saved."""
    cp = flashcp.ContextParallel(transport=transport, timeout_s=20)
    plan = flashcp.plan(lengths, cp.world_size, "per_document")
    decoder = Decoder(replace(MODEL, **model), cp)
    tokens = torch.arange(sum(lengths)) * 7 % MODEL.vocab_size
    labels = tokens.roll(-1).masked_fill(tokens % 5 == 0, NO_LABEL)
    keep = saved_tensors_hooks(*(Tensor.clone if elsewhere else (lambda x: x) for _ in range(2)))
    with Largest() as largest:
        with keep:
            loss = decoder.loss(cp.shard(tokens, plan), cp.shard(labels, plan), cp.position_ids(plan), plan)
        loss.backward()
    if dist.is_initialized():
        cp.sum_gradients(decoder)
        loss = loss.detach().clone()
        dist.all_reduce(loss)
    return loss.item(), {name: weight.grad for name, weight in decoder.named_parameters()}, largest.elements


@pytest.mark.parametrize("loss_rows", [1, 10, 83, 1000])
@pytest.mark.parametrize("tied", [False, True])
def test_a_loss_in_parts_is_the_loss(loss_rows: int, tied: bool) -> None:
    loss, gradients, largest = learnt(LENGTHS, tied_embeddings=tied)
    in_parts, of_parts, most = learnt(LENGTHS, tied_embeddings=tied, loss_rows=loss_rows)
    assert abs(in_parts - loss) < 1e-6 * loss
    for name, gradient in gradients.items():
        assert relative_error(of_parts[name], gradient) < 1e-6, name
    assert largest == 83 * 500
    assert most == max(500 * min(loss_rows, 83), 500 * 32)  # never more logits; and the output's weights


def test_on_ranks_of_which_some_have_no_rows_or_keep_activations_elsewhere() -> None:
    for lengths in (LENGTHS, (2,)):
        loss, gradients, _ = learnt(lengths)
        cases = [(lengths, transport, True) for transport in ("shm", "gloo")]
        kept = run_cases(learnt, 3, cases)
        parts = run_cases(in_parts_on_rank, 3, [(lengths,)])
        for total, found, _ in (rank for ranks in (*kept, *parts) for rank in ranks):
            assert abs(total - loss) < 1e-5 * abs(loss)
            for name, gradient in gradients.items():
                assert relative_error(found[name], gradient) < 1e-5, name


def in_parts_on_rank(lengths: tuple[int, ...]) -> Any:
    return learnt(lengths, loss_rows=8, checkpoint_activations=True)
