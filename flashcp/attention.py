"""`varlen_attention`: the kernels alone, on one device that holds the whole pack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from flashcp.kernels.inputs import check_inputs, check_return_lse
from flashcp.kernels.library import attention as attention_operator
from flashcp.kernels.library import mask_tensor, whole_pack
from flashcp.kernels.scores import read_scores
from flashcp.kernels.selection import attention_name
from flashcp.kernels.tuning import Tuning, check_tuning
from flashcp.sharding.documents import read_document_lengths
from flashcp.sharding.mask import Mask


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_lengths: Iterable[int] | Tensor,
    attention: str = "auto",
    softmax_scale: float | None = None,
    tuning: Tuning | None = None,
    *,
    masks: Mask | Sequence[Mask] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_lengths: Iterable[int] | Tensor,
    attention: str = "auto",
    softmax_scale: float | None = None,
    tuning: Tuning | None = None,
    *,
    masks: Mask | Sequence[Mask] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_lengths: Iterable[int] | Tensor,
    attention: str = "auto",
    softmax_scale: float | None = None,
    tuning: Tuning | None = None,
    *,
    masks: Mask | Sequence[Mask] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention inside each document of a pack, differentiable.

    q: [tokens, query heads, head_dim], k and v: [tokens, KV heads, head_dim]; fp32, bf16 or fp16. Returns
    [tokens, query heads, v's head_dim] in q's dtype. attention: `auto` or the name of an implementation. tuning: block
    shapes for the Triton kernels instead of the table's.
    masks: which rows of its document a row sees, one mask for all documents or one each; causal by default.
    softcap: scaled scores s become softcap * tanh(s / softcap). sinks: [query heads], learnt logits that join the
    softmax of every row and have no value (gpt-oss).
    return_lse: return (out, log-sum-exp fp32 [tokens, query heads], sinks counted) too. The log-sum-exp carries no
    gradient: one that arrives for it raises RuntimeError in the backward.

    Under torch.compile a list of lengths is a constant: a new list compiles anew. To compile once for all packs hand
    over `flashcp.kernels.library.dynamic(torch.tensor(lengths))`, int64 on the CPU.
    Masks are constants there.
    Raises ValueError for shapes, dtypes, lengths, masks, numbers and names that do not fit, and for what an
    implementation does not compute (docs/masks.md).
    """
    check_inputs(q, k, v, own_v_dim=True)
    scores = read_scores(q, softmax_scale, softcap, sinks)
    check_return_lse(return_lse)
    check_tuning(tuning)
    attention_name(attention, q.device)  # raises; the operator reads `auto` itself, for what that refuses
    lengths = _checked(document_lengths) if isinstance(document_lengths, Tensor) else _tensor(document_lengths)
    empty = k.new_empty((0, 2, *k.shape[1:]))
    out, lse = attention_operator(
        q,
        k,
        v,
        empty,
        whole_pack(lengths, len(q), mask_tensor(masks)),
        scores.scale,
        attention,
        "" if tuning is None else tuning.to_text(),
        scores.softcap,
        sinks,
        return_lse,
    )
    return (out, lse) if return_lse else out


def _checked(lengths: Tensor) -> Tensor:
    """Raises ValueError for a tensor that cannot be looked at as a list of lengths."""
    if lengths.layout is not torch.strided or lengths.is_meta or lengths.dtype.is_floating_point:
        raise ValueError(
            f"document_lengths is a {lengths.layout} tensor of {lengths.dtype} on {lengths.device}: expected a dense "
            "one of whole numbers, on the CPU"
        )
    return lengths


def _tensor(document_lengths: Iterable[int]) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.tensor(list(document_lengths), dtype=torch.int64)
    return torch.tensor(read_document_lengths(document_lengths).tolist())
