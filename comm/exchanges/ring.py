"""`ring`: at step k a rank computes on the block of rank r - k while the next one is on its way.

Partial results are merged in fp32. In the backward pass the gradient of a block goes round too: it starts at its
owner's successor, every rank adds its share in fp32, the last one hands it to the owner.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from flashcp.comm.exchanges.flight import Flight, Layout
from flashcp.comm.exchanges.homecoming import Homecoming
from flashcp.comm.exchanges.receiving import ReceivingExchange
from flashcp.comm.rows import ChosenRows, WholeRows
from flashcp.comm.transport import Arrival, Transport
from flashcp.kernels.interface import KV
from flashcp.kernels.schedule import Schedule
from flashcp.sharding.plan import ShardingPlan

__all__ = ["Ring"]


class Ring(ReceivingExchange):
    """See the module."""

    name = "ring"
    moves_later = True

    def start(self, plan: ShardingPlan, k: Tensor, v: Tensor) -> Flight:
        """See Exchange."""
        return _RingFlight(self.transport, self.layout(plan), k, v)

    def return_gradients(self, plan: ShardingPlan, gradients: Tensor) -> Homecoming:
        """See ReceivingExchange."""
        return _RingHomecoming(self.transport, self.layout(plan), gradients)


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
        self._started: list[Arrival] = []

    def shift(self, leaving: WholeRows | ChosenRows) -> None:
        """Hand on what the next rank has not got."""
        step = len(self._started)
        into, offset = self._part(step), self._stops_there[step]
        self._started.append(self._transport.shift(leaving, self.inbox, step, into, offset))

    def wait(self) -> Tensor:
        """The rows of the shift that was started last."""
        self._started[-1].wait()
        self.arrived = len(self._started)
        return self.inbox.rows[self._part(self.arrived - 1)]

    def leave(self) -> None:
        """Return when all that was handed on has left."""
        for arrival in self._started:
            arrival.leave()

    def _part(self, step: int) -> slice:
        """The rows of the inbox that a shift fills."""
        return slice(self._stops[step], self._stops[step + 1])


class _RingFlight(Flight):
    def __init__(self, transport: Transport, layout: Layout, k: Tensor, v: Tensor) -> None:
        self._layout = layout
        sizes = [_blocks(layout, rank) for rank in range(transport.world_size)]
        self._steps = _Steps(transport, sizes, (2, *k.shape[1:]), k)
        self.inbox = self._steps.inbox
        self._steps.shift(ChosenRows((k, v), layout.sent_index(k.device)))

    def arrivals(self, stages: int) -> Iterator[Schedule]:
        """See Flight: one schedule a block; the block moves on before it is computed on."""
        layout, ranks = self._layout, self._layout.plan.world_size
        for step in range(1, ranks):
            block = self._steps.wait()
            if step + 1 < ranks:
                self._steps.shift(WholeRows(block))
            yield layout.schedule_of(((layout.rank - step) % ranks,))

    def leave(self) -> None:
        """See Flight."""
        self._steps.leave()


class _RingHomecoming(Homecoming):
    def __init__(self, transport: Transport, layout: Layout, gradients: Tensor) -> None:
        self._shares = gradients.split(_blocks(layout, layout.rank))
        sizes = [_sums(layout, rank) for rank in range(transport.world_size)]
        self._steps = _Steps(transport, sizes, gradients.shape[1:], gradients)
        self._transport, self._own = transport, gradients[:0]
        self._steps.shift(WholeRows(self._shares[0], "gradients"))

    def wait(self) -> None:
        """See Homecoming. Each hop adds this rank's share to the sum that arrived and hands it on."""
        while self._steps.arrived < len(self._shares):
            total = self._steps.wait()
            if self._steps.arrived < len(self._shares):
                total.add_(self._shares[self._steps.arrived])
                self._steps.shift(WholeRows(total, "gradients"))
            else:
                self._own = total
        self._steps.leave()

    def add_to(self, gradients: KV) -> None:
        """See Homecoming: the sum of all others' shares, in ring order, onto the owner's own."""
        self.wait()
        for total, part in zip(gradients, self._own.unbind(1), strict=True):
            total += part
        self._transport.free(self._steps.inbox.ticket)
