"""`exact`, `compacted` and `all_gather`: all rows of all ranks come in one transfer.

`exact`: each rank sends to each other only the rows that one reads. The others send a block, padded to the largest
rank's, to every rank; they differ in the rows that a block holds (`flashcp.sharding.exchanges`).

The gradients of rows that went from one rank to another come back from it, in one slot of the owner's inbox, as soon
as that rank has finished them.

Shapes: T local rows, R rows of the receive buffer, N ranks, K KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np
from torch import Tensor

from flashcp.comm.exchanges.exchange import IncomingKV
from flashcp.comm.exchanges.receiving import GradientReturn, ReceivingExchange
from flashcp.comm.transport import OutgoingRows, Transfer, Transport
from flashcp.kernels.interface import KV
from flashcp.sharding.exchanges import traffic
from flashcp.sharding.plan import ShardingPlan


class Exact(ReceivingExchange):
    name = "exact"

    def __init__(self, transport: Transport, meet: Callable[[], None]) -> None:
        super().__init__(transport, meet)
        self._traffic = lru_cache(maxsize=4)(traffic)

    def rows(self, plan: ShardingPlan) -> np.ndarray:
        """Rows that go from each rank (first axis) to each other (second axis), int64 [N, N]."""
        return self._traffic(plan)

    def slots(self, index: Tensor, sent: list[int]) -> Iterable[tuple[int, Tensor]]:
        """Where gradients come home, in rank order: a slot's first row, and the local rows that its own are for.

        index: local rows in the order they left. sent: how many went to each rank.
        """
        return zip(np.cumsum([0, *sent[:-1]]).tolist(), index.split(sent), strict=True)

    def places(self, received: list[int]) -> list[slice]:
        """Where each rank's rows lie in the receive buffer. received: how many of each travelled."""
        stops = np.cumsum(received).tolist()
        return [slice(stop - rows, stop) for stop, rows in zip(stops, received, strict=True)]

    def start(self, plan: ShardingPlan, k: Tensor, v: Tensor) -> IncomingKV:
        """Ranks that send or receive nothing still take part."""
        layout, rows, own = self.layout(plan), self.rows(plan), self.transport.rank
        sent, received, before = rows[own].tolist(), rows[:, own].tolist(), rows[:own].sum(0).tolist()
        inbox = self.transport.inbox(sum(received), int(rows.sum(0).max()), (2, *k.shape[1:]), k)  # [R, 2, K, D]
        outgoing = OutgoingRows(KV(k, v), layout.sent_index(k.device))
        return layout.incoming(self.transport.all_to_all(outgoing, sent, inbox, received, before), inbox)

    def return_gradients(self, plan: ShardingPlan, like: Tensor) -> GradientReturn:
        """The same exchange with senders and readers exchanged. Rows of one slot are distinct, so the sum is
        repeatable."""
        rows, own, ranks = self.rows(plan), self.transport.rank, self.transport.world_size
        sent, received, before = rows[own].tolist(), rows[:, own].tolist(), rows[:, :own].sum(1).tolist()
        inbox = self.transport.inbox(sum(sent), int(rows.sum(1).max()), like.shape[1:], like)
        departures = self.transport.one_by_one(received, inbox, sent, before, "gradients")
        places = self.places(received)
        staying = [(own - i) % ranks for i in range(1, ranks)]  # no rank is everybody's first
        home: list[Transfer] = []

        def leave(gradients: Tensor, source: int | None = None) -> None:
            for each in staying.copy() if source is None else [source]:
                departures.send(each, gradients[places[each]])
                staying.remove(each)
            if source is None:
                home.append(departures.close())

        def finish() -> None:
            home[0].finish()

        def add_to(local: KV) -> None:
            finish()
            for start, index in self.slots(self.layout(plan).sent_index(like.device), sent):
                slot = inbox.rows[start : start + len(index)]
                for total, part in zip(local, slot.unbind(1), strict=True):
                    total.index_add_(0, index, part.to(total.dtype))
            self.transport.free(inbox.ticket)

        return GradientReturn(like.dtype, leave, finish, add_to)


class AllGather(Exact):
    """Llama 3's exchange: all rows."""

    name = "all_gather"

    def rows(self, plan: ShardingPlan) -> np.ndarray:
        """A rank's own block stays at home: it read those rows from its local tensor."""
        return self._block_rows(plan) * (1 - np.eye(plan.world_size, dtype=np.int64))

    def slots(self, index: Tensor, sent: list[int]) -> Iterable[tuple[int, Tensor]]:
        return ((sum(sent[:rank]), index) for rank in range(len(sent)) if rank != self.transport.rank)

    def places(self, received: list[int]) -> list[slice]:
        """Its own block lies among the others."""
        rows = max(received)
        return [slice(rows * rank, rows * (rank + 1)) for rank in range(len(received))]

    def start(self, plan: ShardingPlan, k: Tensor, v: Tensor) -> IncomingKV:
        layout, rows = self.layout(plan), self._block_rows(plan)
        index, total = layout.sent_index(k.device), rows * plan.world_size
        block = k.new_zeros((rows, 2, *k.shape[1:]))  # [rows, 2, K, D]
        OutgoingRows(KV(k, v), index).write(block[: len(index)], 0, len(index))
        inbox = self.transport.inbox(total, total, block.shape[1:], k)
        return layout.incoming(self.transport.all_gather(OutgoingRows(block), inbox), inbox)

    def _block_rows(self, plan: ShardingPlan) -> int:
        return plan.route(self.name).block_rows


class Compacted(AllGather):
    """The paper's exchange: non-last rows only."""

    name = "compacted"
