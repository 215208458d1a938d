"""`varlen_attention`: the kernels alone, on one device that holds the whole pack."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from flashcp.kernels.inputs import check_inputs, default_scale
from flashcp.kernels.library import attention as attention_operator
from flashcp.kernels.library import whole_pack
from flashcp.kernels.selection import attention_name
from flashcp.kernels.tuning import Tuning, check_tuning
from flashcp.sharding.documents import read_document_lengths


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_lengths: Iterable[int] | Tensor,
    attention: str = "auto",
    softmax_scale: float | None = None,
    tuning: Tuning | None = None,
) -> Tensor:
    """Causal attention inside each document of a pack, differentiable.

    q: [tokens, query heads, head_dim], k and v: [tokens, KV heads, head_dim]; fp32, bf16 or fp16. Returns
    [tokens, query heads, head_dim] in q's dtype. attention: `auto` or the name of an implementation. tuning: block
    shapes for the Triton kernels instead of the table's.

    Under torch.compile a list of lengths is a constant: a new list compiles anew. To compile once for all packs hand
    over `flashcp.kernels.library.dynamic(torch.tensor(lengths))`, int64 on the CPU.
    Raises ValueError for shapes, dtypes, lengths and names that do not fit.
    """
    check_inputs(q, k, v)
    check_tuning(tuning)
    lengths = document_lengths if isinstance(document_lengths, Tensor) else _tensor(document_lengths)
    empty = k.new_empty((0, 2, *k.shape[1:]))
    return attention_operator(
        q,
        k,
        v,
        empty,
        whole_pack(lengths, len(q)),
        default_scale(q, softmax_scale),
        attention_name(attention, q.device),
        "" if tuning is None else tuning.to_text(),
    )[0]


def _tensor(document_lengths: Iterable[int]) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.tensor(list(document_lengths), dtype=torch.int64)
    return torch.tensor(read_document_lengths(document_lengths).tolist())
