"""Document lengths, tensors and errors that many tests share."""

from __future__ import annotations

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


def relative_error(value: Tensor, reference: Tensor) -> float:
    """||a - b|| / ||b||, b in float64; against a reference of zero, ||a||."""
    norm = reference.double().norm().item()
    return (value.double() - reference.double()).norm().item() / (norm if norm else 1.0)
