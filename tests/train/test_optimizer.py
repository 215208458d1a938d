"""Learning rate, weight decay, and gradients in one buffer."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from flashcp.schema import read_dataclass
from flashcp.train.optimizer import FlatGradients, OptimizerConfig, build_optimizer, learning_rate
from tests.ranks import run_ranks


def test_warm_up_then_half_a_cosine() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.2)
    rates = [learning_rate(config, step, 12) for step in range(1, 13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[7] == pytest.approx(0.6)  # half way
    assert rates[11] == pytest.approx(0.2)
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert learning_rate(OptimizerConfig(lr=1.0, warmup_steps=0), 1, 1) == pytest.approx(0.1)


def test_weight_decay_shrinks_matrices_only() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.RMSNorm(3))
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.5))
    before = [weight.detach().clone() for weight in model.parameters()]
    FlatGradients(model).zero()
    optimizer.step()
    matrix, norm = model.parameters()
    torch.testing.assert_close(matrix, before[0] * 0.95)
    assert torch.equal(norm, before[1])


def test_gradients_are_views_of_one_buffer_and_clip_together() -> None:
    model = nn.Linear(2, 2)
    gradients = FlatGradients(model)
    for _ in range(2):  # accumulates in place
        model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None
    assert model.bias.grad is not None
    assert model.weight.grad.tolist() == [[2, 2], [2, 2]]
    assert gradients.norm() == pytest.approx(24**0.5)
    for enough in (0.0, 5.0):  # 0: no limit
        gradients.clip(gradients.norm(), enough)
        assert model.bias.grad.tolist() == [2, 2]
    gradients.clip(gradients.norm(), 1.0)
    assert gradients.norm() == pytest.approx(1.0, rel=1e-5)
    assert model.bias.grad[0].item() == pytest.approx(2 / 24**0.5, rel=1e-5)
    gradients.zero()
    assert model.weight.grad.abs().sum() == 0


def sum_gradients() -> list[float]:
    model = nn.Linear(1, 2, bias=True)
    gradients = FlatGradients(model)
    (model(torch.ones(1, 1)).sum() * (dist.get_rank() + 1)).backward()
    gradients.sum_over_ranks()
    assert model.weight.grad is not None
    return model.weight.grad.flatten().tolist()


def test_gradients_are_summed_not_averaged() -> None:
    assert run_ranks(sum_gradients, 2) == [[3.0, 3.0]] * 2


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lr", 0.0, r"optimizer\.lr=0\.0: expected a number > 0"),
        ("lr", float("nan"), r"optimizer\.lr=nan: expected a finite number"),
        ("warmup_steps", -1, r"optimizer\.warmup_steps=-1: expected a whole number >= 0"),
        ("beta2", 1.0, r"optimizer\.beta2=1\.0: expected a number >= 0 and < 1"),
        ("min_lr_ratio", 1.5, r"optimizer\.min_lr_ratio=1\.5: expected 0 to 1"),
    ],
)
def test_numbers_outside_their_range(field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_dataclass(OptimizerConfig, {field: value}, "optimizer")
