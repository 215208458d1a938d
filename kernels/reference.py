"""The specification: causal attention inside each document, in float64, written to be read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from einops import einsum, repeat
from torch import Tensor

from flashcp.kernels.inputs import check_heads, default_scale
from flashcp.sharding.documents import read_document_lengths


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, document_lengths: Iterable[int], softmax_scale: float | None = None
) -> Tensor:
    """Attention over a whole pack: every row attends to the rows of its own document up to itself.

    q: [tokens, query heads, head_dim], k and v: [tokens, KV heads, head_dim], query heads a multiple of KV heads.
    softmax_scale: 1 / sqrt(head_dim) by default. Returns float64 [tokens, query heads, head_dim], differentiable.
    Raises ValueError for shapes that do not fit and lengths that do not add up to the tokens.
    """
    check_heads(q, k, v)
    lengths = read_document_lengths(document_lengths).tolist()
    if sum(lengths) != len(q):
        raise ValueError(f"document_lengths add up to {sum(lengths)}: expected the {len(q)} tokens of q")
    scale = default_scale(q, softmax_scale)
    group = q.shape[1] // k.shape[1]
    q64, k64, v64 = (x.double().split(lengths) for x in (q, k, v))
    return torch.cat([_document(*rows, group, scale) for rows in zip(q64, k64, v64, strict=True)])


def _document(q: Tensor, k: Tensor, v: Tensor, group: int, scale: float) -> Tensor:
    k, v = (repeat(x, "t h d -> t (h g) d", g=group) for x in (k, v))
    scores = einsum(q, k, "i h d, j h d -> h i j") * scale
    future = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu(1)
    return einsum(scores.masked_fill(future, -torch.inf).softmax(-1), v, "h i j, j h d -> i h d")
