"""`exact`: an all-to-all in which each rank sends to each other only the rows that one reads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from flashcp.comm.exchanges.base import Flight, Layout, ReceivingExchange, ReturnedRows, pack_rows
from flashcp.comm.transport import Arrival
from flashcp.kernels.schedule import Schedule
from flashcp.sharding.plan import Segments, ShardingPlan

__all__ = ["Exact"]


class Exact(ReceivingExchange):
    """See the module. Ranks that send or receive nothing still take part."""

    name = "exact"

    def start(self, plan: ShardingPlan, k: Tensor, v: Tensor) -> Flight:
        """See Exchange."""
        layout = self.layout(plan)
        sent, received = self._counts(layout)
        buffer = k.new_empty((sum(received), 2, *k.shape[1:]))
        rows = pack_rows(k, v, layout.sent_index)
        return OneArrival(self.transport.all_to_all(rows, sent, buffer, received), buffer, layout)

    def return_gradients(self, plan: ShardingPlan, gradients: Tensor) -> ReturnedRows:
        """See ReceivingExchange: the way back is the same all-to-all with senders and readers exchanged."""
        layout = self.layout(plan)
        sent, received = self._counts(layout)
        slots = gradients.new_empty((sum(sent), *gradients.shape[1:]))
        arrival = self.transport.all_to_all(gradients, received, slots, sent)
        return ReturnedRows(arrival, slots.split(sent), layout.sent_index.split(sent))

    def _counts(self, layout: Layout) -> tuple[list[int], list[int]]:
        return rows_by_rank(layout.sent, layout.plan), rows_by_rank(layout.received, layout.plan)


class OneArrival(Flight):
    """All rows arrive in one operation."""

    def __init__(self, arrival: Arrival, buffer: Tensor, layout: Layout) -> None:
        self.buffer = buffer
        self._arrival, self._layout = arrival, layout

    def arrivals(self) -> Iterator[Schedule]:
        """See Flight."""
        self._arrival.wait()
        yield self._layout.received_schedule


def rows_by_rank(segments: Segments, plan: ShardingPlan) -> list[int]:
    """Rows of some segments per other end."""
    total = np.zeros(plan.world_size, dtype=np.int64)
    np.add.at(total, segments.rank, segments.stop - segments.start)
    return total.tolist()
