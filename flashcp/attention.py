"""Attention over packed documents on one device: no distribution, no plan."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from flashcp.comm.clock import Clock
from flashcp.comm.exchanges.base import Job
from flashcp.comm.exchanges.exact import Exact
from flashcp.comm.handshake import Header
from flashcp.comm.transport import Alone
from flashcp.kernels.inputs import check_heads
from flashcp.kernels.selection import select_attention
from flashcp.operator import Call, Handle
from flashcp.sharding.documents import read_document_lengths
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.strategies import plan

__all__ = ["varlen_attention"]


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_lengths: Iterable[int],
    attention: str = "auto",
    softmax_scale: float | None = None,
) -> Tensor:
    """Causal attention inside each document of a pack, differentiable.

    q: [tokens, query heads, head_dim], k and v: [tokens, KV heads, head_dim]; fp32, bf16 or fp16. Returns
    [tokens, query heads, head_dim] in q's dtype. attention: `auto` or the name of an implementation.
    Raises ValueError for shapes, dtypes, lengths and names that do not fit.
    """
    check_heads(q, k, v)
    lengths = tuple(read_document_lengths(document_lengths).tolist())
    if sum(lengths) != len(q):
        raise ValueError(f"document_lengths add up to {sum(lengths)}: expected the {len(q)} tokens of q")
    whole = _whole(lengths)
    job = Job(select_attention(attention, q.device), "none", False, Clock())
    call = Call(whole, _ALONE, job, Header(), handshake=None)
    with torch.no_grad():
        flight = _ALONE.start(whole, k, v)
    return Handle(call, flight, k, v).attention(q, softmax_scale)


_ALONE = Exact(Alone())


@lru_cache(maxsize=4)
def _whole(lengths: tuple[int, ...]) -> ShardingPlan:
    return plan(lengths, 1, "contiguous")
