"""One-sided transport: rows are put where they are read, and a flag per source tells when they are there.

The receive buffers lie in a symmetric heap (`heap.py`); a fabric (`fabrics/`) writes into other ranks' memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from flashcp.comm.clock import span
from flashcp.comm.fabrics.base import Fabric, Put, Ticking
from flashcp.comm.heap import Lease, SymmetricHeap
from flashcp.comm.rows import Inbox, Leaving
from flashcp.comm.transport import Arrival
from flashcp.kernels.interface import WaitFlags

__all__ = ["OneSided"]


class OneSided:
    """See the module."""

    one_sided = True

    def __init__(self, fabric: Fabric, heap: SymmetricHeap) -> None:
        self.fabric, self.heap = fabric, heap
        self.name, self.rank, self.world_size = fabric.name, fabric.rank, fabric.world_size

    @property
    def sent_bytes(self) -> int:
        """See Transport."""
        return self.fabric.sent_bytes

    @property
    def receive_bytes(self) -> int:
        """See Transport."""
        return self.heap.total_bytes

    @property
    def oldest(self) -> int:
        """See Transport."""
        return min(self.heap.oldest_alive, self.fabric.oldest_put)

    def inbox(self, rows: int, most: int, row: Sequence[int], like: Tensor, steps: int = 1) -> Inbox:
        """See Transport. Raises HeapError past the heap's limit."""
        lease = self.heap.take(most * math.prod(row) * like.element_size(), steps)
        token = self.heap.token(lease)  # without rows nothing holds it
        return Inbox(self.fabric.tensor(lease.region, rows, row, like.dtype, token), lease.first)

    def is_open(self, ticket: int) -> bool:
        """See Transport."""
        return ticket == 0 or self.heap.find(ticket) is not None

    def free(self, ticket: int) -> None:
        """See Transport."""
        if lease := self.heap.find(ticket):
            self.heap.free(lease)

    def all_to_all(
        self, leaving: Leaving, sent: Sequence[int], inbox: Inbox, received: Sequence[int], offsets: Sequence[int]
    ) -> Arrival:
        """See Transport. The next rank's rows leave first, and so on round: no rank is everybody's first."""
        stops = np.cumsum(sent)
        targets = [(self.rank + i) % self.world_size for i in range(1, self.world_size + 1)]
        parts = [(int(stops[to] - sent[to]), int(stops[to]), to, int(offsets[to])) for to in targets if sent[to]]
        sources = [source for source, rows in enumerate(received) if rows]
        return self._put(leaving, parts, inbox, sources)

    def all_gather(self, block: Leaving, inbox: Inbox) -> Arrival:
        """See Transport."""
        rows = len(block)
        targets = [(self.rank + i) % self.world_size for i in range(1, self.world_size + 1)] if rows else []
        return self._put(block, [(0, rows, to, rows * self.rank) for to in targets], inbox, sorted(targets))

    def shift(self, leaving: Leaving, inbox: Inbox, step: int, into: slice, offset: int) -> Arrival:
        """See Transport."""
        rows, to = len(leaving), (self.rank + 1) % self.world_size
        sources = [(self.rank - 1) % self.world_size] if into.stop > into.start else []
        return self._put(leaving, [(0, rows, to, offset)] if rows else [], inbox, sources, step)

    def synchronize(self) -> None:
        """See Transport."""
        self.fabric.synchronize()

    def _put(
        self,
        leaving: Leaving,
        parts: Sequence[tuple[int, int, int, int]],
        inbox: Inbox,
        sources: Sequence[int],
        step: int = 0,
    ) -> Arrival:
        lease = self.heap.find(inbox.ticket)
        assert lease is not None, "rows were sent to an inbox that is free"
        row, like = tuple(inbox.rows.shape[1:]), inbox.rows
        row_bytes = math.prod(row) * like.element_size()
        puts = [
            Put(
                lease.region,
                leaving,
                start,
                stop,
                to,
                offset * row_bytes,
                row,
                like.dtype,
                lease.after,
                lease.first + step,
            )
            for start, stop, to, offset in parts
        ]
        return _Arrival(self.fabric, lease, lease.first + step, sources, self.fabric.put(puts), leaving.what)


class _Arrival:
    def __init__(
        self, fabric: Fabric, lease: Lease, epoch: int, sources: Sequence[int], leaving: Ticking, what: str
    ) -> None:
        self._fabric, self._region, self._epoch = fabric, lease.region, epoch
        self._awaited, self._leaving, self._what = list(sources), leaving, what

    def wait(self, source: int | None = None) -> None:
        for each in list(self._awaited) if source is None else [source]:
            if each in self._awaited:
                with span(f"wait for {self._what} of rank {each}"):
                    self._fabric.wait(self._region, each, self._epoch)
                self._awaited.remove(each)

    def leave(self) -> None:
        with span(f"wait until {self._what} have left"):
            self._leaving.leave()

    def flags(self) -> WaitFlags | None:
        if not self._awaited:
            return None  # nothing holds the region of an inbox without rows
        return self._fabric.flags(self._region, self._epoch)

    def check(self, flags: WaitFlags) -> None:
        self._fabric.check(flags)
