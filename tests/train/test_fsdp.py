"""FSDP over the decoder with context parallelism on the same ranks: loss and gradients of the unsharded model."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import flashcp
from flashcp.train.model import Decoder
from flashcp.train.model_config import ModelConfig
from flashcp.train.ranks import Ranks
from tests.packs import relative_error
from tests.ranks import run_cases, run_ranks

MODEL = ModelConfig(layers=2, dim=32, heads=4, kv_heads=2, vocab_size=50)
LENGTHS = (30, 7, 1, 45)


def pack() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and positions of a window."""
    tokens = torch.randint(MODEL.vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    return tokens, tokens.roll(-1), torch.cat([torch.arange(length) for length in LENGTHS])


def sharded(
    exchange: str, checkpoint_activations: bool, replicas: int = 1
) -> tuple[float, float, dict[str, Tensor], int]:
    """Loss of all ranks, largest share of a weight on this one, whole gradients, attention calls in the backward.

    The batch is the same window `replicas` times: each replica has one, weights are sharded over all ranks.
    """
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    cp = flashcp.ContextParallel(ranks.replica(replicas).group, exchange=exchange, timeout_s=20)
    plan = flashcp.plan(LENGTHS, cp.world_size, "per_document")
    model = Decoder(replace(MODEL, checkpoint_activations=checkpoint_activations), cp)
    whole = {name: weight.numel() for name, weight in model.named_parameters()}
    for module in (*model.blocks, model):
        fully_shard(module)
    cp.prepare(model)
    share = max(weight.to_local().numel() / whole[name] for name, weight in model.named_parameters())
    tokens, labels, _ = (cp.shard(x, plan) for x in pack())
    loss = model.loss(tokens, labels, cp.position_ids(plan), plan)
    forward_calls = cp._calls
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    gradients = {name: weight.grad.full_tensor() for name, weight in model.named_parameters()}
    return total.item(), share, gradients, cp._calls - forward_calls


def test_weights_sharded_over_all_replicas_learn_what_whole_ones_do() -> None:
    model = Decoder(MODEL, flashcp.ContextParallel())
    loss = 2 * model.loss(*pack(), flashcp.plan(LENGTHS, 1))
    loss.backward()
    for total, share, gradients, _ in run_ranks(sharded, 4, "exact", False, 2):
        assert share < 0.35
        assert abs(total - loss.item()) < 1e-5 * loss.item()
        for name, weight in model.named_parameters():
            assert relative_error(gradients[name], weight.grad) < 1e-5, name


def test_sharded_weights_learn_what_whole_ones_do() -> None:
    model = Decoder(MODEL, flashcp.ContextParallel())
    loss = model.loss(*pack(), flashcp.plan(LENGTHS, 1))
    loss.backward()
    cases = [("exact", False), ("exact", True), ("ring", True)]
    for (_, checkpointed), ranks in zip(cases, run_cases(sharded, 2, cases), strict=True):
        for total, share, gradients, recomputed in ranks:
            assert share < 0.6
            assert recomputed == (MODEL.layers if checkpointed else 0)
            assert abs(total - loss.item()) < 1e-5 * loss.item()
            for name, weight in model.named_parameters():
                assert relative_error(gradients[name], weight.grad) < 1e-5, name
