"""`ring`: at step k a rank computes on the block of rank r - k while the next one is on its way.

Partial results are merged in fp32. In the backward pass the gradient of a block goes round too: it starts at its
owner's successor, every rank adds its share in fp32, the last one hands it to the owner.

Shapes: T local rows, R rows of the receive buffer, K KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from flashcp.comm.exchanges.exchange import IncomingKV, Layout
from flashcp.comm.exchanges.receiving import GradientReturn, ReceivingExchange
from flashcp.comm.rows import OutgoingRows
from flashcp.comm.transport import Transfer, Transport
from flashcp.kernels.interface import KV
from flashcp.kernels.schedule import Schedule
from flashcp.sharding.plan import ShardingPlan

__all__ = ["Ring"]


class Ring(ReceivingExchange):
    """See the module."""

    name = "ring"
    moves_later = True

    def start(self, plan: ShardingPlan, k: Tensor, v: Tensor) -> IncomingKV:
        layout, ranks = self.layout(plan), plan.world_size
        sizes = [_blocks(layout, rank) for rank in range(ranks)]
        steps = _Steps(self.transport, sizes, (2, *k.shape[1:]), k)
        steps.shift(OutgoingRows(KV(k, v), layout.sent_index(k.device)))

        def parts(stages: int) -> Iterator[Schedule]:
            """One schedule a block; the block moves on before it is computed on."""
            for step in range(1, ranks):
                block = steps.wait()
                if step + 1 < ranks:
                    steps.shift(OutgoingRows(block))
                yield layout.schedule_of(((layout.rank - step) % ranks,))

        return IncomingKV(steps.inbox, parts, steps.leave)

    def return_gradients(self, plan: ShardingPlan, gradients: Tensor) -> GradientReturn:
        layout = self.layout(plan)
        shares = gradients.split(_blocks(layout, layout.rank))
        sizes = [_sums(layout, rank) for rank in range(plan.world_size)]
        steps = _Steps(self.transport, sizes, gradients.shape[1:], gradients)
        steps.shift(OutgoingRows(shares[0], what="gradients"))

        def wait() -> None:
            """Each hop adds this rank's share to the sum that arrived and hands it on; the last sum is its own."""
            while steps.arrived < len(shares):
                total = steps.wait()
                if steps.arrived < len(shares):
                    total.add_(shares[steps.arrived])
                    steps.shift(OutgoingRows(total, what="gradients"))
            steps.leave()

        def add_to(gradients: KV) -> None:
            """The sum of all others' shares, in ring order, onto the owner's own."""
            wait()
            for total, part in zip(gradients, steps.rows_of_last().unbind(1), strict=True):
                total += part
            self.transport.free(steps.inbox.ticket)

        return GradientReturn(wait, add_to)


def _blocks(layout: Layout, rank: int) -> list[int]:
    """Rows of the blocks that come to a rank, in order: those of rank - 1, rank - 2, ..., rank + 1."""
    ranks = layout.plan.world_size
    return [int(layout.plan.tokens[(rank - step) % ranks]) for step in range(1, ranks)]


def _sums(layout: Layout, rank: int) -> list[int]:
    """Rows of the sums of gradients that come to a rank: of all the blocks but the first, then of its own."""
    return [*_blocks(layout, rank)[1:], int(layout.plan.tokens[rank])]


class _Steps:
    """One shift after another through one inbox, which holds what arrives in order of arrival."""

    def __init__(self, transport: Transport, sizes: Sequence[list[int]], row: Sequence[int], like: Tensor) -> None:
        own, there = sizes[transport.rank], sizes[(transport.rank + 1) % transport.world_size]
        self._transport = transport
        self._stops, self._stops_there = ([0, *np.cumsum(part).tolist()] for part in (own, there))
        most = max(sum(part) for part in sizes)
        self.inbox = transport.inbox(sum(own), most, row, like, steps=len(own))
        self.arrived = 0  # shifts that were waited for
        self._started: list[Transfer] = []

    def shift(self, outgoing: OutgoingRows) -> None:
        """Hand on what the next rank has not got."""
        step = len(self._started)
        into, offset = self._part(step), self._stops_there[step]
        self._started.append(self._transport.shift(outgoing, self.inbox, step, into, offset))

    def wait(self) -> Tensor:
        """The rows of the shift that was started last."""
        self._started[-1].wait()
        self.arrived = len(self._started)
        return self.rows_of_last()

    def rows_of_last(self) -> Tensor:
        """What the last shift that was waited for brought."""
        return self.inbox.rows[self._part(self.arrived - 1)]

    def leave(self) -> None:
        """Return when all that was handed on has left."""
        for transfer in self._started:
            transfer.leave()

    def _part(self, step: int) -> slice:
        """The rows of the inbox that a shift fills."""
        return slice(self._stops[step], self._stops[step + 1])
