"""`ring`: at step k a rank computes on the block of rank r - k while the next one is on its way.

Partial results are merged in fp32. In the backward pass the gradient of a block goes round too: it starts at its
owner's successor, every rank adds its share in fp32, the last one hands it to the owner.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flashcp.comm.exchanges.base import Flight, Homecoming, Layout, ReceivingExchange, pack_rows
from flashcp.comm.transport import Transport
from flashcp.kernels.cpu import KV
from flashcp.kernels.schedule import Schedule
from flashcp.sharding.plan import ShardingPlan

__all__ = ["Ring"]


class Ring(ReceivingExchange):
    """See the module."""

    name = "ring"
    moves_later = True

    def start(self, plan: ShardingPlan, k: Tensor, v: Tensor) -> Flight:
        """See Exchange."""
        layout = self.layout(plan)
        return _RingFlight(self.transport, layout, pack_rows(k, v, layout.sent_index))

    def return_gradients(self, plan: ShardingPlan, gradients: Tensor) -> Homecoming:
        """See ReceivingExchange."""
        return _RingHomecoming(self.transport, self.layout(plan), gradients)


def _arriving_rows(layout: Layout) -> list[int]:
    """Rows of the blocks in order of arrival: those of rank - 1, rank - 2, ..., rank + 1."""
    ranks = layout.plan.world_size
    return [int(layout.plan.tokens[(layout.rank - step) % ranks]) for step in range(1, ranks)]


class _RingFlight(Flight):
    def __init__(self, transport: Transport, layout: Layout, own: Tensor) -> None:
        rows = _arriving_rows(layout)
        self.buffer = own.new_empty((sum(rows), *own.shape[1:]))
        self._transport, self._layout = transport, layout
        self._blocks = [own, *self.buffer.split(rows)]
        self._arrival = transport.shift(own, self._blocks[1])

    def arrivals(self) -> Iterator[Schedule]:
        """See Flight: one schedule a block; the block moves on before it is computed on."""
        layout, ranks = self._layout, self._layout.plan.world_size
        for step in range(1, ranks):
            self._arrival.wait()
            if step + 1 < ranks:
                self._arrival = self._transport.shift(self._blocks[step], self._blocks[step + 1])
            yield layout.schedule_of_source((layout.rank - step) % ranks)


class _RingHomecoming(Homecoming):
    def __init__(self, transport: Transport, layout: Layout, gradients: Tensor) -> None:
        self._transport = transport
        self._shares = gradients.split(_arriving_rows(layout))
        own_rows = int(layout.plan.tokens[layout.rank])
        self._own = gradients.new_empty((own_rows, *gradients.shape[1:]))
        self._step = 1
        self._incoming = self._next_incoming()
        self._arrival = transport.shift(self._shares[0], self._incoming)

    def wait(self) -> None:
        """See Homecoming. Each hop adds this rank's share to the sum that arrived and hands it on."""
        while self._step < len(self._shares):
            self._arrival.wait()
            total = self._incoming.add_(self._shares[self._step])
            self._step += 1
            self._incoming = self._next_incoming()
            self._arrival = self._transport.shift(total, self._incoming)
        self._arrival.wait()

    def add_to(self, gradients: KV) -> None:
        """See Homecoming: the sum of all others' shares, in ring order, onto the owner's own."""
        self.wait()
        for total, part in zip(gradients, self._own.unbind(1), strict=True):
            total += part

    def _next_incoming(self) -> Tensor:
        last = self._step == len(self._shares)
        return self._own if last else torch.empty_like(self._shares[self._step])
