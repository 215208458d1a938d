"""Everyone who computes attention on packs, behind one interface: a function of a case's tensors, or None.

None means that a peer is not installed or does not do the case; the benchmark leaves its cell empty.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcp.attention import varlen_attention
from flashcp.experiments.bench.attention_cases import OURS, Case, Tensors
from flashcp.kernels.interface import KV
from flashcp.kernels.launch import TritonAttention
from flashcp.kernels.library import attention, schedule_tensor
from flashcp.kernels.tuning import Pass, Tuning, architecture, choose
from flashcp.kernels.varlen import KERNELS
from flashcp.kernels.varlen.base import Sequences

Forward = Callable[[], Tensor]
Peer = Callable[[Case, Tensors], Forward | None]


def ours(case: Case, x: Tensors, tuning: Tuning | None = None) -> Forward:
    """The Triton kernels: `varlen_attention` on packs, the operator under it on a rank's share."""
    tuning = tuning or Tuning()
    if case.lengths is not None:
        lengths = torch.tensor(case.lengths)
        return lambda: varlen_attention(x.q, x.k, x.v, lengths, tuning=tuning)
    schedule, scale = schedule_tensor(case.schedule), case.head_dim**-0.5
    return lambda: attention(x.q, x.k, x.v, x.received, schedule, scale, tuning=tuning.to_text())[0]


def any_order(case: Case, x: Tensors) -> Forward | None:
    """The same, with the one backward kernel on Hopper."""
    return ours(case, x, Tuning(deterministic=False)) if architecture(x.q.device) == "sm_90" else None


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


def of_packs(make: Callable[[Tensors, tuple[int, ...], Sequences], Forward | None]) -> Peer:
    """A peer that takes whole packs alone, and their documents by cumulative lengths."""

    def made(case: Case, x: Tensors) -> Forward | None:
        if case.lengths is None:
            return None
        offsets = torch.tensor((0, *case.lengths)).cumsum(0).to(x.q.device, torch.int32)
        longest = max(case.lengths)
        return make(x, case.lengths, Sequences(offsets, offsets, longest, longest, causal=True))

    return made


@of_packs
def torch_fa2(x: Tensors, lengths: tuple[int, ...], seqs: Sequences) -> Forward:
    """torch's own FlashAttention-2 on packs, the operator under `torch.nn.attention.varlen`."""
    *rows, causal = seqs
    return lambda: torch.ops.aten._flash_attention_forward(x.q, x.k, x.v, *rows, 0.0, causal, False)[0]


@of_packs
def flex(x: Tensors, lengths: tuple[int, ...], seqs: Sequences) -> Forward:
    """FlexAttention with a BlockMask of the documents.

    After eight shapes torch would compile no more and run it unfused, without a word: it starts anew for every case,
    and `fullgraph` makes an error of what is left.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    document = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(x.q.device)

    def same_document(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document[query] == document[key])

    # Blocks of 128 x 128: `full` need no mask, `partial` do. Documents are sorted, so ends of blocks tell all.
    rows = len(x.q)
    blocks = torch.arange(-(-rows // 128), device=x.q.device)
    first, last = document[blocks * 128], document[(blocks * 128 + 127).clamp(max=rows - 1)]
    below = blocks[:, None] > blocks
    full = below & (last[:, None] == first[None, :])
    full[-1] &= rows % 128 == 0  # rows that fill up the last block see nothing
    touching = (blocks[:, None] >= blocks) & (last[None, :] >= first[:, None])
    tables = *_sparse(touching & ~full), *_sparse(full)
    mask = BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=128, mask_mod=same_document, seq_lengths=(rows, rows))
    q, k, v = (y.transpose(0, 1)[None] for y in (x.q, x.k, x.v))
    grouped = q.shape[1] != k.shape[1]
    torch._dynamo.reset()
    compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=grouped)[0].transpose(0, 1)


def _sparse(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """A table of blocks as FlexAttention takes it: how many in each row, and their columns, those first."""
    count = blocks.sum(1, dtype=torch.int32)
    columns = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return count[None, None], columns[None, None]


@of_packs
def cudnn(x: Tensors, lengths: tuple[int, ...], seqs: Sequences) -> Forward | None:
    """cuDNN through torch's scaled_dot_product_attention: only documents of one length."""
    if len(set(lengths)) > 1:
        return None
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.unflatten(0, (len(lengths), -1)).transpose(1, 2) for y in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1)

    return _with_heads_it_takes(forward, x)


@of_packs
def cudnn_varlen(x: Tensors, lengths: tuple[int, ...], seqs: Sequences) -> Forward:
    """cuDNN on packs (`kernels/varlen/cudnn.py`). Forward only where the backward writes past its buffers."""
    forward = _with_heads_it_takes(lambda q, k, v: CudnnVarlen.apply(q, k, v, seqs), x)
    return torch.no_grad()(forward) if KERNELS["cudnn"].no_backward() else forward


class CudnnVarlen(torch.autograd.Function):
    """cuDNN's causal attention of documents one behind another, differentiable. q, k, v: [tokens, heads, head_dim]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, seqs: Sequences) -> Tensor:
        out, lse = KERNELS["cudnn"].forward(q, k, v, seqs, q.shape[-1] ** -0.5)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.seqs = seqs
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        return *KERNELS["cudnn"].backward(grads[0], q, k, v, out, lse, ctx.seqs, scale), None


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


def _flash_package(x: Tensors, lengths: tuple[int, ...], seqs: Sequences, module: str) -> Forward | None:
    """A package of FlashAttention, where it is installed."""
    if not find_spec(module.partition(".")[0]):
        return None
    function: Any = import_module(module).flash_attn_varlen_func

    def forward() -> Tensor:
        out = function(x.q, x.k, x.v, **seqs._asdict())
        return out[0] if isinstance(out, tuple) else out

    return forward if module != "fa3_fwd_interface" else torch.no_grad()(forward)  # that wheel has no backward


FA3 = "flash_attn_interface" if find_spec("flash_attn_interface") else "fa3_fwd_interface"
PEERS: dict[str, Peer] = {
    OURS: ours,
    "any_order": any_order,
    "portable": portable,
    "torch_fa2": torch_fa2,
    "flex": flex,
    "cudnn": cudnn,
    "cudnn_varlen": cudnn_varlen,
    "fa3": of_packs(partial(_flash_package, module=FA3)),
    "fa4": of_packs(partial(_flash_package, module="flash_attn.cute")),
}
