"""From the ranks' local rows back to the pack, differentiable."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashcp.comm.handshake import Handshake, Header, Step
from flashcp.comm.transport import OutgoingRows, Transport
from flashcp.kernels.uploads import Uploaded
from flashcp.sharding.documents import expand_ranges
from flashcp.sharding.plan import ShardingPlan

_PLANS = 8  # whose rows stay on a device


def unshard(
    local: Tensor, plan: ShardingPlan, transport: Transport, handshake: Handshake | None, header: Header
) -> Tensor:
    """All rows of the pack [tokens, ...] on every rank, from each rank's local rows [rank's tokens, ...].

    The gradient of a local row is the sum over ranks of the gradients of its copies, added in rank order in fp32.
    handshake, header: what the ranks compared before, and compare again before gradients move.
    """
    return _Unshard.apply(local, plan, transport, handshake, header)


@lru_cache(maxsize=_PLANS)
def local_rows(plan: ShardingPlan, rank: int, device: torch.device) -> Uploaded:
    """`plan.rows(rank)` on a device, int64."""
    return Uploaded(plan.rows(rank), device)


@lru_cache(maxsize=_PLANS)
def _order(plan: ShardingPlan, device: torch.device) -> Uploaded:
    return Uploaded(_rank_by_rank(plan), device)


@lru_cache(maxsize=_PLANS)
def _places(plan: ShardingPlan, device: torch.device) -> Uploaded:
    """Where each row of the pack lies among blocks of all ranks that are as long as the longest."""
    places = np.empty(int(plan.offsets[-1]), dtype=np.int64)
    places[_rank_by_rank(plan)] = expand_ranges(np.arange(plan.world_size) * plan.tokens.max(), plan.tokens)
    return Uploaded(places, device)


def _rank_by_rank(plan: ShardingPlan) -> np.ndarray:
    """Rows of the pack, those of rank 0 first."""
    return np.concatenate([plan.rows(rank) for rank in range(plan.world_size)])


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        local: Tensor,
        plan: ShardingPlan,
        transport: Transport,
        handshake: Handshake | None,
        header: Header,
    ) -> Tensor:
        ctx.plan, ctx.transport, ctx.handshake, ctx.header = plan, transport, handshake, header
        most = int(plan.tokens.max())
        block = local.new_zeros((most, *local.shape[1:]))
        block[: len(local)] = local
        total = most * plan.world_size
        inbox = transport.inbox(total, total, block.shape[1:], block)
        transfer = transport.all_gather(OutgoingRows(block), inbox)
        transfer.wait()
        transfer.leave()
        full = inbox.rows.index_select(0, _places(plan, local.device).here())
        transport.free(inbox.ticket)
        return full

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan, transport = ctx.plan, ctx.transport
        if ctx.handshake is not None:
            ctx.handshake.compare(ctx.header._replace(step=Step.BACKWARD))
        order = _order(plan, grad.device).here()
        tokens, ranks = plan.tokens.tolist(), plan.world_size
        own = tokens[transport.rank]
        inbox = transport.inbox(own * ranks, max(tokens) * ranks, grad.shape[1:], grad)
        offsets = [count * transport.rank for count in tokens]
        transfer = transport.all_to_all(
            OutgoingRows(grad.index_select(0, order)), tokens, inbox, [own] * ranks, offsets
        )
        transfer.wait()
        transfer.leave()
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = inbox.rows.unflatten(0, (ranks, own)).to(wide).sum(0)
        transport.free(inbox.ticket)
        return total.to(grad.dtype), None, None, None, None
