"""Decoders whose layers differ: they learn on several ranks what one process learns, under one plan for the mix."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import flashcp
from flashcp.train.data.windows import NO_LABEL
from flashcp.train.model import Decoder
from flashcp.train.model_config import ModelConfig
from tests.ranks import run_ranks

SIZE = {"layers": 4, "dim": 32, "heads": 4, "kv_heads": 2, "vocab_size": 64}
KINDS = {
    "gemma 3": {"window": 9, "full_every": 3},
    "gpt-oss": {"window": 4, "full_every": 2, "sinks": True},
    "llama 4": {"chunk": 16, "full_every": 4},
    "mistral": {"window": 20},
    "deepseek": {"latent": 24, "kv_heads": 4},
    "latents and windows": {"latent": 8, "kv_heads": 4, "window": 12, "full_every": 2, "sinks": True, "softcap": 9.0},
    "gemma 2": {"window": 12, "full_every": 2, "softcap": 20.0},
}
LENGTHS = (61, 5, 30)


def learns(kind: str) -> tuple[list[float], int]:
    """Losses of three steps, the sum over ranks, and the bytes that left this rank."""
    cp = flashcp.ContextParallel(timeout_s=20)
    model = ModelConfig(**{**SIZE, **KINDS[kind]})
    decoder = Decoder(model, cp, seed=3)
    plan = flashcp.plan(LENGTHS, cp.world_size, layers=model.mix())
    tokens = torch.randint(0, 64, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1)
    labels[plan.offsets[1:] - 1] = NO_LABEL
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.3 / sum(LENGTHS))
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = decoder.loss(cp.shard(tokens, plan), cp.shard(labels, plan), cp.position_ids(plan), plan)
        loss.backward()
        total = loss.detach().clone()
        if cp.world_size > 1:
            for weight in decoder.parameters():
                dist.all_reduce(weight.grad)
            dist.all_reduce(total)
        losses.append(float(total))
        optimizer.step()
    return losses, cp.sent_bytes


@pytest.mark.parametrize("kind", list(KINDS))
def test_ranks_learn_what_one_process_does(kind: str) -> None:
    ((alone, _),) = run_ranks(learns, 1, kind)
    assert alone[2] < alone[0]
    for ranks in (2, 3):
        for losses, _ in run_ranks(learns, ranks, kind):
            assert losses == pytest.approx(alone, rel=1e-5)


def test_kinds_differ_and_windows_send_less() -> None:
    found = {kind: run_ranks(learns, 2, kind) for kind in ("gemma 3", "mistral", "gemma 2")}
    assert len({tuple(ranks[0][0]) for ranks in found.values()}) == len(found)
    full = sum(sent for _, sent in run_ranks(learns_without_windows, 2))
    assert all(sum(sent for _, sent in ranks) < full for ranks in found.values())


def learns_without_windows() -> tuple[list[float], int]:
    KINDS["full"] = {}
    return learns("full")


def test_which_layers_see_all() -> None:
    limits = [ModelConfig(**SIZE, window=9, full_every=2).limits(layer)["window"] for layer in range(4)]
    assert limits == [9, None, 9, None]
    assert ModelConfig(**SIZE, chunk=8).mix() == [(flashcp.Mask("chunk", 8), 4)]
    assert ModelConfig(**SIZE, window=9, full_every=3).mix() == [(flashcp.Mask(), 1), (flashcp.Mask("window", 9), 3)]
    assert ModelConfig(**SIZE).mix() is None


@pytest.mark.parametrize(("changes", "said"), [
    ({"window": 4, "chunk": 4}, "model.window=4 and model.chunk=4: expected one of them to be 0"),
    ({"full_every": 2}, "model.full_every=2: expected model.window or model.chunk for the other layers"),
    ({"window": 9, "full_every": 5}, "model.full_every=5: expected at most model.layers=4"),
    ({"latent": 8}, "model.latent=8 with model.kv_heads=2: expected model.heads"),
    ({"softcap": -1.0}, "model.softcap=-1.0: expected a finite number >= 0"),
])  # fmt: skip
def test_layers_that_no_model_has_are_refused(changes: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ModelConfig(**SIZE, **changes).check()  # type: ignore[arg-type]
