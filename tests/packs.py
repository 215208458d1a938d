"""Document lengths, tensors and errors that many tests share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

AWKWARD = (
    (1,) * 7,
    (1, 127, 129),
    (257,),
    (13, 1, 53, 2, 97),
    (1, 1, 200, 1, 1),
    tuple(1 + i % 3 for i in range(60)),
)


def random_lengths(seed: int, at_least: int = 8) -> tuple[int, ...]:
    """Lengths of one to nine documents, mostly short, together at least `at_least` tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, rng.choice([4, 30, 150]), rng.integers(1, 10)).tolist()
    return (*lengths, at_least)


def random_qkv(
    tokens: int, query_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v of a whole pack and the gradient of its output, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((query_heads,), (kv_heads,), (kv_heads,), (query_heads,))
    return tuple(torch.randn(tokens, *heads, head_dim, generator=generator).to(dtype) for heads in shapes)  # type: ignore[return-value]


def gradient_terms(qkv: Sequence[Tensor], grad: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Sizes of the terms that dQ and dK are sums of, in float64 with their shapes.

    dQ = sum of scale P (dO.V - dO.O) K over the keys, each product a sum over head_dim: here all with absolute values
    and a plus. Rounding errs by a share of this, also where everything cancels: in a document of one row dQ = dK = 0.
    """
    q, k, v, grad = (x.detach().double().transpose(0, 1) for x in (*qkv, grad))  # [heads, tokens, head_dim]
    group, scale = len(q) // len(k), q.shape[-1] ** -0.5
    of_q, of_k = torch.zeros_like(q), torch.zeros_like(k)
    keys, values = (x.repeat_interleave(group, dim=0) for x in (k, v))
    stops = np.cumsum(lengths).tolist()
    for rows in (slice(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)):
        scores = scale * q[:, rows] @ keys[:, rows].mT
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        pulled = grad[:, rows].abs()
        parts = pulled @ values[:, rows].abs().mT + (pulled * (weights @ values[:, rows]).abs()).sum(-1, keepdim=True)
        of_q[:, rows] = scale * weights * parts @ keys[:, rows].abs()
        of_k[:, rows] = (scale * (weights * parts).mT @ q[:, rows].abs()).unflatten(0, (-1, group)).sum(1)
    return of_q.transpose(0, 1), of_k.transpose(0, 1)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """||a - b|| / ||b||, b in float64; against a reference of zero, ||a||."""
    norm = reference.double().norm().item()
    return (value.double() - reference.double()).norm().item() / (norm if norm else 1.0)
