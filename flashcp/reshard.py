"""Rows from one plan's ranks to another's, differentiable."""

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
from flashcp.gather import check_gradients
from flashcp.kernels.uploads import Uploaded
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.reshard import Move
from flashcp.untraced import untraced

_MOVES = 8  # pairs of plans whose rows stay on a device


class Resharding:
    """Rows under way from one plan's ranks to another's; `rows()` returns them. header: what the ranks compared, and
    compare again before gradients move."""

    def __init__(
        self, x: Tensor, before: ShardingPlan, after: ShardingPlan, connection: Connection, header: Header
    ) -> None:
        self._x, self._of_call = x, (before, after, connection, header)
        with connection.watched(header.call):
            self._moving: _Moving | None = _Moving(connection.transport, before, after, x.detach())

    @untraced
    def rows(self) -> Tensor:
        """This rank's rows under the other plan, differentiable. Raises RuntimeError when called twice, and where they
        left without gradients and now want some; ExchangeError as ContextParallel says."""
        if self._moving is None:
            raise RuntimeError("this handle's rows were taken: reshard again")
        check_gradients(self._x, self._of_call[-1])
        moving, self._moving = self._moving, None
        return _Reshard.apply(self._x, moving, *self._of_call)


class _Moving:
    """Rows [tokens, ...] on their way."""

    def __init__(self, transport: Transport, before: ShardingPlan, after: ShardingPlan, x: Tensor) -> None:
        self._transport = transport
        self._way = way = _way(before, after, transport.rank, x.device)
        self._leaving = x.index_select(0, way.leaving.here())
        travels = torch.cat([self._leaving[: way.stays.start], self._leaving[way.stays.stop :]])
        self._inbox = transport.inbox(sum(way.received), way.most, x.shape[1:], x)
        outgoing = OutgoingRows(travels, what="resharded rows")
        self._transfer = transport.all_to_all(outgoing, way.sent, self._inbox, way.received, way.offsets)

    def finish(self) -> Tensor:
        self._transfer.finish()
        way, arrived = self._way, self._inbox.rows
        stayed = self._leaving[way.stays]
        together = torch.cat([arrived[: way.place], stayed, arrived[way.place :]])  # a copy: the inbox ends here
        self._transport.free(self._inbox.ticket)
        return torch.empty_like(together).index_copy_(0, way.arriving.here(), together)


class _Reshard(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        moving: _Moving,
        before: ShardingPlan,
        after: ShardingPlan,
        connection: Connection,
        header: Header,
    ) -> Tensor:
        ctx.of_call = before, after, connection, header
        with connection.watched(header.call):
            return moving.finish()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        before, after, connection, header = ctx.of_call
        if connection.handshake is not None:
            connection.handshake.compare(header._replace(step=Step.BACKWARD))
        with connection.watched(header.call):
            return _Moving(connection.transport, after, before, grad).finish(), None, None, None, None, None


class _Way(NamedTuple):
    """This rank's part of a move. sent, received: rows to and from each other rank. most: rows of the fullest inbox.
    offsets: the row of each rank's inbox where this rank's begin. leaving, arriving: local rows, those for and from
    rank 0 first; stays: which of those that leave do not, and place: where they belong among those that arrive."""

    sent: list[int]
    received: list[int]
    most: int
    offsets: list[int]
    leaving: Uploaded
    arriving: Uploaded
    stays: slice
    place: int


@lru_cache(maxsize=_MOVES)
def _way(before: ShardingPlan, after: ShardingPlan, rank: int, device: torch.device) -> _Way:
    move = Move(before, after)
    rows = move.rows
    first = int(rows[rank, :rank].sum())
    stays, place = slice(first, first + int(rows[rank, rank])), int(rows[:rank, rank].sum())
    np.fill_diagonal(rows, 0)
    return _Way(
        rows[rank].tolist(),
        rows[:, rank].tolist(),
        int(rows.sum(0).max()),
        rows[:rank].sum(0).tolist(),
        Uploaded(move.leaving(rank), device),
        Uploaded(move.arriving(rank), device),
        stays,
        place,
    )
