"""What the tests measure errors by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import flashcp
from tests.packs import gradient_terms, random_qkv


def tf32(x: Tensor) -> Tensor:
    """The numbers as tensor cores read them: 10 bits of mantissa."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("head_dim", [16, 64, 256])
@pytest.mark.parametrize("lengths", [(1,) * 7, (1, 127, 129), (32,) * 4], ids=str)
def test_fp32_errs_by_a_small_share_of_the_terms(lengths: tuple[int, ...], head_dim: int) -> None:
    *qkv, grad = random_qkv(sum(lengths), 4, 2, head_dim, torch.float32, seed=1)
    leaves, exact = ([cast(x).clone().requires_grad_() for x in qkv] for cast in (Tensor.float, Tensor.double))
    found = torch.autograd.grad(flashcp.varlen_attention(*leaves, lengths), leaves, grad)
    wanted = torch.autograd.grad(flashcp.reference_attention(*exact, lengths), exact, grad.double())
    for value, expected, terms in zip(found, wanted, gradient_terms(qkv, grad, lengths), strict=False):
        assert bool(expected.any()) == (lengths != (1,) * 7)
        assert (terms >= expected.abs() * (1 - 1e-9)).all()
        assert (value.double() - expected).norm() < 5e-8 * terms.norm()


@pytest.mark.parametrize("head_dim", [16, 64, 256])
def test_one_product_in_tf32_errs_by_a_share_that_shows(head_dim: int) -> None:
    q, k, v, grad = random_qkv(7, 1, 1, head_dim, torch.float32, seed=1)
    delta = (grad.double() * v).sum(-1, keepdim=True)  # a document of one row: the output is V
    rounded = (tf32(grad).double() * tf32(v)).sum(-1, keepdim=True)
    terms, _ = gradient_terms((q, k, v), grad, (1,) * 7)
    assert (head_dim**-0.5 * (rounded - delta) * k).norm() > 1e-5 * terms.norm()
