"""From the ranks' local rows back to the pack, differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashcp.comm.handshake import Handshake, Header, Step
from flashcp.comm.rows import WholeRows
from flashcp.comm.transport import Transport
from flashcp.sharding.plan import ShardingPlan

__all__ = ["unshard"]


def unshard(
    local: Tensor, plan: ShardingPlan, transport: Transport, handshake: Handshake | None, header: Header
) -> Tensor:
    """All rows of the pack [tokens, ...] on every rank, from each rank's local rows [rank's tokens, ...].

    The gradient of a local row is the sum over ranks of the gradients of its copies, added in rank order in fp32.
    handshake, header: what the ranks compared before, and compare again before gradients move.
    """
    return _Unshard.apply(local, plan, transport, handshake, header)


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
        arrival = transport.all_gather(WholeRows(block), inbox)
        arrival.wait()
        arrival.leave()
        full = local.new_empty((int(plan.offsets[-1]), *local.shape[1:]))
        for rank, rows in enumerate(inbox.rows.split(most)):
            full[torch.from_numpy(plan.rows(rank))] = rows[: plan.tokens[rank]]
        transport.free(inbox.ticket)
        return full

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan, transport = ctx.plan, ctx.transport
        if ctx.handshake is not None:
            ctx.handshake.compare(ctx.header._replace(step=Step.BACKWARD))
        order = torch.cat([torch.from_numpy(plan.rows(rank)) for rank in range(plan.world_size)])
        tokens, ranks = plan.tokens.tolist(), plan.world_size
        own = tokens[transport.rank]
        inbox = transport.inbox(own * ranks, max(tokens) * ranks, grad.shape[1:], grad)
        offsets = [count * transport.rank for count in tokens]
        arrival = transport.all_to_all(WholeRows(grad[order]), tokens, inbox, [own] * ranks, offsets)
        arrival.wait()
        arrival.leave()
        total = inbox.rows.unflatten(0, (ranks, own)).float().sum(0)
        transport.free(inbox.ticket)
        return total.to(grad.dtype), None, None, None, None
