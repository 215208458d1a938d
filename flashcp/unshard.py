"""From the ranks' local rows back to the pack, differentiable."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashcp.comm.choice import Connection
from flashcp.comm.header import Header, Step
from flashcp.comm.transport import OutgoingRows, Transport
from flashcp.kernels.uploads import Uploaded
from flashcp.sharding.documents import expand_ranges
from flashcp.sharding.holders import members_rows, rows_of_rank
from flashcp.sharding.plan import ShardingPlan

_PLANS = 8  # whose rows stay on a device


def unshard(local: Tensor, plan: ShardingPlan, connection: Connection, header: Header) -> Tensor:
    """All rows of the pack [tokens, ...] on every rank, from each rank's local rows [rank's tokens, ...]: first the
    rows of a holder, then those of all holders.

    The gradient of a local row is the sum over ranks of the gradients of its copies, added in fp32 in rank order, on
    each of the two levels. header: what the ranks compared before, and compare again before gradients move.
    """
    between, inside = connection.transport, connection.inside
    device, rows = local.device, local
    if inside is not None and inside.world_size > 1:
        blocks = _of_holder(int(plan.tokens[between.rank]), inside.world_size, device)
        rows = _Unshard.apply(rows, blocks, inside, connection, between.world_size == 1, header)
    if inside is None or between.world_size > 1:  # else a plan of one holder, whose rows are the pack as it lies
        rows = _Unshard.apply(rows, _of_plan(plan, device), between, connection, True, header)
    return rows


@lru_cache(maxsize=_PLANS)
def local_rows(plan: ShardingPlan, rank: int, head_ranks: int, device: torch.device) -> Uploaded:
    """`rows_of_rank` on a device, int64."""
    return Uploaded(rows_of_rank(plan, rank, head_ranks), device)


class _Blocks(NamedTuple):
    """Rows that every rank has some of. tokens: how many each. order: the rows, those of rank 0 first. places: of every
    row, among blocks of all ranks that are as long as the longest."""

    tokens: list[int]
    order: Uploaded
    places: Uploaded


@lru_cache(maxsize=_PLANS)
def _of_plan(plan: ShardingPlan, device: torch.device) -> _Blocks:
    """Rows of the pack, those of each of the plan's ranks."""
    return _blocks(plan.tokens, np.concatenate([plan.rows(rank) for rank in range(plan.world_size)]), device)


@lru_cache(maxsize=_PLANS)
def _of_holder(rows: int, head_ranks: int, device: torch.device) -> _Blocks:
    """Rows of a holder, those of each of its ranks."""
    return _blocks(members_rows(rows, head_ranks), np.arange(rows), device)


def _blocks(tokens: np.ndarray, order: np.ndarray, device: torch.device) -> _Blocks:
    places = np.empty(len(order), dtype=np.int64)
    places[order] = expand_ranges(np.arange(len(tokens)) * tokens.max(), tokens)
    return _Blocks(tokens.tolist(), Uploaded(order, device), Uploaded(places, device))


class _Unshard(torch.autograd.Function):
    """Rows of some ranks on each of them. transport: one of the connection's. compares: whether the ranks compare notes
    here before gradients move, and not at another place."""

    @staticmethod
    def forward(
        ctx: Any,
        local: Tensor,
        blocks: _Blocks,
        transport: Transport,
        connection: Connection,
        compares: bool,
        header: Header,
    ) -> Tensor:
        ctx.blocks, ctx.header = blocks, header
        ctx.transport, ctx.connection, ctx.compares = transport, connection, compares
        most = max(blocks.tokens)
        block = local.new_zeros((most, *local.shape[1:]))
        block[: len(local)] = local
        total = most * len(blocks.tokens)
        inbox = transport.inbox(total, total, block.shape[1:], block)
        with connection.watched(header.call):
            transport.all_gather(OutgoingRows(block), inbox).finish()
        full = inbox.rows.index_select(0, blocks.places.here())
        transport.free(inbox.ticket)
        return full

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        transport, (tokens, order, _) = ctx.transport, ctx.blocks
        if ctx.compares and ctx.connection.handshake is not None:
            ctx.connection.handshake.compare(ctx.header._replace(step=Step.BACKWARD))
        own, ranks = tokens[transport.rank], len(tokens)
        inbox = transport.inbox(own * ranks, max(tokens) * ranks, grad.shape[1:], grad)
        offsets = [count * transport.rank for count in tokens]
        leaving = OutgoingRows(grad.index_select(0, order.here()))
        with ctx.connection.watched(ctx.header.call):
            transport.all_to_all(leaving, tokens, inbox, [own] * ranks, offsets).finish()
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = inbox.rows.unflatten(0, (ranks, own)).to(wide).sum(0)
        transport.free(inbox.ticket)
        return total.to(grad.dtype), None, None, None, None, None
