"""One-sided transport: rows are put where they are read, and a flag per source tells when they are there.

The receive buffers lie in a symmetric heap (`heap.py`); a fabric (`fabrics/`) writes into other ranks' memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from flashcp.comm.clock import span
from flashcp.comm.fabrics.base import Fabric, Put
from flashcp.comm.heap import Lease, SymmetricHeap
from flashcp.comm.transport import Departures, Inbox, OutgoingRows, Transfer, Transport, row_bytes
from flashcp.kernels.interface import WaitFlags


class OneSided(Transport):
    one_sided = True

    def __init__(self, fabric: Fabric, heap: SymmetricHeap) -> None:
        self.fabric, self.heap = fabric, heap
        self.name, self.rank, self.world_size = fabric.name, fabric.rank, fabric.world_size
        self.throttle_gbps = fabric.throttle_gbps

    @property
    def sent_bytes(self) -> int:
        return self.fabric.sent_bytes

    @property
    def receive_bytes(self) -> int:
        return self.heap.total_bytes

    @property
    def oldest(self) -> int:
        return min(self.heap.oldest_alive, self.fabric.oldest_put)

    def inbox(self, rows: int, most: int, row: Sequence[int], like: Tensor, steps: int = 1) -> Inbox:
        """Raises HeapError past the heap's limit."""
        lease = self.heap.take(most * math.prod(row) * like.element_size(), steps)
        token = self.heap.token(lease)  # without rows nothing holds it
        return Inbox(self.fabric.tensor(lease.region, rows, row, like.dtype, token), lease.first)

    def is_open(self, ticket: int) -> bool:
        return ticket == 0 or self.heap.find(ticket) is not None

    def free(self, ticket: int) -> None:
        if lease := self.heap.find(ticket):
            self.heap.free(lease)

    def all_to_all(
        self, outgoing: OutgoingRows, sent: Sequence[int], inbox: Inbox, received: Sequence[int], offsets: Sequence[int]
    ) -> Transfer:
        stops = np.cumsum(sent)
        parts = [(int(stops[to] - sent[to]), int(stops[to]), to, int(offsets[to])) for to in self._round() if sent[to]]
        return self._put(outgoing, parts, inbox, [source for source, rows in enumerate(received) if rows])

    def one_by_one(
        self, sent: Sequence[int], inbox: Inbox, received: Sequence[int], offsets: Sequence[int], what: str
    ) -> Departures:
        return _OneByOne(self, inbox, received, offsets, what)

    def all_gather(self, block: OutgoingRows, inbox: Inbox) -> Transfer:
        rows = len(block)
        targets = self._round() if rows else []
        return self._put(block, [(0, rows, to, rows * self.rank) for to in targets], inbox, sorted(targets))

    def shift(self, outgoing: OutgoingRows, inbox: Inbox, step: int, into: slice, offset: int) -> Transfer:
        rows, to = len(outgoing), (self.rank + 1) % self.world_size
        sources = [(self.rank - 1) % self.world_size] if into.stop > into.start else []
        return self._put(outgoing, [(0, rows, to, offset)] if rows else [], inbox, sources, step)

    def check(self, flags: WaitFlags) -> None:
        self.fabric.check(flags)

    def synchronize(self) -> None:
        self.fabric.synchronize()

    def close(self) -> None:
        self.fabric.close()

    def _round(self) -> list[int]:
        """All ranks, the next one first and this one last: no rank is everybody's first."""
        return [(self.rank + i) % self.world_size for i in range(1, self.world_size + 1)]

    def _put(
        self,
        outgoing: OutgoingRows,
        parts: Sequence[Sequence[int]],
        inbox: Inbox,
        sources: Sequence[int],
        step: int = 0,
    ) -> Transfer:
        """parts: (first row, stop, to which rank, row of its inbox) of what leaves."""
        return self.coming(inbox, sources, self.leaving(outgoing, parts, inbox, step), outgoing.what, step)

    def leaving(
        self, outgoing: OutgoingRows, parts: Sequence[Sequence[int]], inbox: Inbox, step: int = 0
    ) -> Callable[[], None]:
        """Put rows into others' inboxes; parts as in `_put`. What is returned returns when they have left."""
        lease = self._lease(inbox)
        row, dtype, size = tuple(inbox.rows.shape[1:]), inbox.rows.dtype, row_bytes(inbox.rows)
        return self.fabric.put([
            Put(lease.region, outgoing, start, stop, to, offset * size, row, dtype, lease.after, lease.first + step)
            for start, stop, to, offset in parts
        ])  # fmt: skip

    def coming(
        self, inbox: Inbox, sources: Sequence[int], leave: Callable[[], None], what: str, step: int = 0
    ) -> Transfer:
        """Rows of some ranks on their way into an inbox, beside this rank's own, for which `leave` waits."""
        lease, fabric = self._lease(inbox), self.fabric
        region, epoch = lease.region, lease.first + step

        def await_rows(source: int) -> None:
            with span(f"wait for {what} of rank {fabric.names[source]}"):
                fabric.wait(region, source, epoch)

        def await_left() -> None:
            with span(f"wait until {what} have left"):
                leave()

        return Transfer(sources, await_rows, await_left, partial(fabric.flags, region, epoch))

    def _lease(self, inbox: Inbox) -> Lease:
        lease = self.heap.find(inbox.ticket)
        assert lease is not None, "rows were sent to an inbox that is free"
        return lease


class _OneByOne(Departures):
    """Each rank's rows leave when they are ready."""

    def __init__(
        self, transport: OneSided, inbox: Inbox, received: Sequence[int], offsets: Sequence[int], what: str
    ) -> None:
        self._transport, self._inbox, self._offsets, self._what = transport, inbox, offsets, what
        self._sources = [source for source, rows in enumerate(received) if rows]
        self._left: list[Callable[[], None]] = []

    def send(self, to: int, rows: Tensor) -> None:
        if len(rows):
            parts = [(0, len(rows), to, self._offsets[to])]
            self._left.append(self._transport.leaving(OutgoingRows(rows, what=self._what), parts, self._inbox))

    def close(self) -> Transfer:
        def leave() -> None:
            for left in self._left:
                left()

        return self._transport.coming(self._inbox, self._sources, leave, self._what)
