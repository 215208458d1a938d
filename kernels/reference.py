"""The specification: attention inside each document, in float64, written to be read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from einops import einsum, repeat
from torch import Tensor

from flashcp.kernels.inputs import check_heads, check_sinks, default_scale, read_softcap
from flashcp.sharding.documents import read_document_lengths
from flashcp.sharding.mask import Mask
from flashcp.sharding.masks import list_masks, read_masks


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_lengths: Iterable[int],
    softmax_scale: float | None = None,
    *,
    masks: Mask | Sequence[Mask] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention over a whole pack: every row attends to the rows of its own document that its mask lets it see.

    q: [tokens, query heads, head_dim], k and v: [tokens, KV heads, head_dim], query heads a multiple of KV heads; v's
    head_dim may be another one. softmax_scale: 1 / sqrt(head_dim) by default. masks: one for all documents or one each,
    causal by default. softcap: scaled scores s become softcap * tanh(s / softcap). sinks: [query heads], logits that
    join the softmax of every row and have no value. Returns float64 [tokens, query heads, v's head_dim].
    Differentiable in q, k, v and sinks.
    Raises ValueError for shapes, masks and numbers that do not fit and lengths that do not add up to the tokens.
    """
    check_heads(q, k, v, own_v_dim=True)
    check_sinks(sinks, q)
    read_lengths = read_document_lengths(document_lengths)
    kinds = [masks or Mask()] * len(read_lengths) if masks is None or isinstance(masks, Mask) else list_masks(masks)
    read_masks(kinds, read_lengths)
    lengths = read_lengths.tolist()
    if sum(lengths) != len(q):
        raise ValueError(f"document_lengths add up to {sum(lengths)}: expected the {len(q)} tokens of q")
    scale, cap = default_scale(q, softmax_scale), read_softcap(softcap)
    group = q.shape[1] // k.shape[1]
    q64, k64, v64 = (x.double().split(lengths) for x in (q, k, v))
    documents = zip(q64, k64, v64, kinds, strict=True)
    return torch.cat([_document(*document, group, scale, cap, sinks) for document in documents])


def sees(mask: Mask, rows: int) -> Tensor:
    """Which keys (second axis) each row of a document sees, as `Mask` says it. bool [rows, rows]."""
    row, key = torch.arange(rows)[:, None], torch.arange(rows)
    seen = key <= row
    if mask.kind == "window":
        seen &= key > row - mask.size
    if mask.kind == "chunk":
        seen &= key >= row // mask.size * mask.size
    if mask.kind == "full":
        seen = torch.ones_like(seen)
    for start, stop in [(0, mask.size)] if mask.kind == "prefix" else mask.blocks:
        seen |= (start <= row) & (row < stop) & (start <= key) & (key < stop)
    return seen


def _document(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, group: int, scale: float, cap: float, sinks: Tensor | None
) -> Tensor:
    k, v = (repeat(x, "t h d -> t (h g) d", g=group) for x in (k, v))
    scores = einsum(q, k, "i h d, j h d -> h i j") * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~sees(mask, len(q)).to(q.device), -torch.inf)
    if sinks is not None:
        finite = sinks.double().clamp(max=torch.finfo(torch.float64).max)  # infinity takes all weight; inf - inf is NaN
        scores = torch.cat((scores, repeat(finite, "h -> h i 1", i=len(q))), dim=-1)
    return einsum(scores.softmax(-1)[..., : len(k)], v, "h i j, j h d -> i h d")
