"""Everyone who computes attention on packs, behind one interface: a function of a case's tensors, or None.

None means that a peer is not installed or does not do the case; the benchmark leaves its cell empty.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcp.experiments.bench.attention_cases import OURS, Case, Forward, Tensors, ours
from flashcp.kernels.interface import KV
from flashcp.kernels.launch import TritonAttention
from flashcp.kernels.tuning import Pass, Tuning, architecture, choose
from flashcp.kernels.varlen import KERNELS

__all__ = ["PEERS"]


def portable(case: Case, x: Tensors) -> Forward | None:
    """Our own portable kernels where a chip has others, forward only: what those gain."""
    arch = architecture(x.q.device)
    if arch != "sm_90":
        return None
    blocks = choose(Pass.FORWARD, arch, case.head_dim, x.q.dtype, case.schedule, case.query_heads // case.kv_heads)
    kernel = TritonAttention(Tuning(forward=blocks))  # blocks that are asked for are the portable kernel's
    q, k, v, received = (y.detach() for y in (x.q, x.k, x.v, x.received))
    inputs = q, KV(k, v), KV(*received.unbind(1)), case.schedule, case.head_dim**-0.5
    return lambda: kernel.attend(*inputs)[0]


def torch_fa2(case: Case, x: Tensors) -> Forward | None:
    """torch's own FlashAttention-2 on packs, the operator under `torch.nn.attention.varlen`."""
    if case.lengths is None:
        return None
    offsets, longest = _offsets(case, x), max(case.lengths)
    operator = torch.ops.aten._flash_attention_forward
    return lambda: operator(x.q, x.k, x.v, offsets, offsets, longest, longest, 0.0, True, False)[0]


def flex(case: Case, x: Tensors) -> Forward | None:
    """FlexAttention with a BlockMask of the documents."""
    if case.lengths is None:
        return None
    from torch.nn.attention.flex_attention import BlockMask

    document = torch.from_numpy(np.repeat(np.arange(len(case.lengths)), case.lengths)).to(x.q.device)

    def same_document(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document[query] == document[key])

    # Blocks of 128 x 128: `full` need no mask, `partial` do. Documents are sorted, so ends of blocks tell all.
    size = -(-case.rows // 128)
    starts = torch.arange(size, device=x.q.device) * 128
    first, last = document[starts], document[(starts + 127).clamp(max=case.rows - 1)]
    below = torch.arange(size, device=x.q.device)[:, None] > torch.arange(size, device=x.q.device)
    full = below & (last[:, None] == first[None, :])
    full[-1] &= case.rows % 128 == 0  # rows that fill up the last block see nothing
    touching = (below | torch.eye(size, dtype=torch.bool, device=x.q.device)) & (last[None, :] >= first[:, None])
    mask = BlockMask.from_kv_blocks(
        *_sparse(touching & ~full),
        *_sparse(full),
        BLOCK_SIZE=128,
        mask_mod=same_document,
        seq_lengths=(case.rows, case.rows),
    )
    q, k, v = (y.transpose(0, 1)[None] for y in (x.q, x.k, x.v))
    grouped = case.query_heads != case.kv_heads
    compiled = _compile_flex()
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=grouped)[0].transpose(0, 1)


def cudnn(case: Case, x: Tensors) -> Forward | None:
    """cuDNN through torch's scaled_dot_product_attention: only documents of one length."""
    if case.lengths is None or len(set(case.lengths)) > 1:
        return None
    from torch.nn.attention import SDPBackend, sdpa_kernel

    documents = len(case.lengths)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.unflatten(0, (documents, -1)).transpose(1, 2) for y in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1)

    return _with_heads_it_takes(forward, x)


def cudnn_varlen(case: Case, x: Tensors) -> Forward | None:
    """cuDNN on packs, by the operators that `torch.nn.attention.varlen` has in store for it (torch 2.11).

    Forward only where the backward writes past its buffers (`kernels/varlen/cudnn.py`).
    """
    if case.lengths is None:
        return None
    offsets, longest = _offsets(case, x), max(case.lengths)
    forward = _with_heads_it_takes(lambda q, k, v: CudnnVarlen.apply(q, k, v, offsets, longest), x)
    return torch.no_grad()(forward) if KERNELS["cudnn"].no_backward() else forward


class CudnnVarlen(torch.autograd.Function):
    """cuDNN's causal attention of documents one behind another. q, k, v [tokens, heads, head_dim], offsets int32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
        found = torch.ops.aten._cudnn_attention_forward(
            q, k, v, None, offsets, offsets, longest, longest, True, 0.0, True, False
        )
        out, log_sum, seed, offset = found[0], found[1], found[6], found[7]
        ctx.save_for_backward(q, k, v, out, log_sum, seed, offset, offsets)
        ctx.longest = longest
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum, seed, offset, offsets = ctx.saved_tensors
        found = torch.ops.aten._cudnn_attention_backward(
            grads[0], q, k, v, out, log_sum, seed, offset, None, offsets, offsets, ctx.longest, ctx.longest, 0.0, True
        )
        return *found, None, None


def fa3(case: Case, x: Tensors) -> Forward | None:
    """FlashAttention-3: `flash_attn_interface`, or the wheel `fa3-fwd`, which has the forward alone."""
    if find_spec("flash_attn_interface"):
        return _flash_package("flash_attn_interface", case, x)
    forward = _flash_package("fa3_fwd_interface", case, x)
    return None if forward is None else torch.no_grad()(forward)


def fa4(case: Case, x: Tensors) -> Forward | None:
    """FlashAttention-4, where `flash_attn.cute` is installed."""
    return _flash_package("flash_attn.cute", case, x)


PEERS: dict[str, Callable[[Case, Tensors], Forward | None]] = {
    OURS: ours,
    "portable": portable,
    "torch_fa2": torch_fa2,
    "flex": flex,
    "cudnn": cudnn,
    "cudnn_varlen": cudnn_varlen,
    "fa3": fa3,
    "fa4": fa4,
}


def _flash_package(module: str, case: Case, x: Tensors) -> Forward | None:
    if case.lengths is None or not find_spec(module.partition(".")[0]):
        return None
    function: Any = import_module(module).flash_attn_varlen_func
    offsets, longest = _offsets(case, x), max(case.lengths)

    def forward() -> Tensor:
        out = function(x.q, x.k, x.v, cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=longest,
                       max_seqlen_k=longest, causal=True)  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    return forward


def _offsets(case: Case, x: Tensors) -> Tensor:
    lengths = torch.tensor((0, *(case.lengths or ())))
    return lengths.cumsum(0).to(x.q.device, torch.int32)


def _sparse(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """A table of blocks as FlexAttention takes it: how many in each row, and their columns, those first."""
    count = blocks.sum(1, dtype=torch.int32)
    columns = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return count[None, None], columns[None, None]


def _with_heads_it_takes(forward: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensors) -> Forward:
    """A function of q, k, v on a case's; where it refuses grouped heads, each call repeats the KV heads first."""
    group = x.q.shape[1] // x.k.shape[1]
    if group > 1:
        try:
            with torch.no_grad():
                forward(x.q, x.k, x.v)
        except RuntimeError:
            return lambda: forward(x.q, *(y.repeat_interleave(group, dim=1) for y in (x.k, x.v)))
    return lambda: forward(x.q, x.k, x.v)


def _compile_flex() -> Callable[..., Tensor]:
    """FlexAttention for the shapes of one case.

    After eight shapes torch would compile no more and run it unfused, without a word: it starts anew for every case,
    and `fullgraph` makes an error of what is left.
    """
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
