"""`exact`: each rank sends to each other only the rows that one reads.

Shapes: T local rows, R rows of the receive buffer, K KV heads, D head_dim.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from torch import Tensor

from flashcp.comm.exchanges.exchange import IncomingKV
from flashcp.comm.exchanges.receiving import GradientReturn, ReceivingExchange, returned_slots
from flashcp.comm.rows import OutgoingRows
from flashcp.comm.transport import Transport
from flashcp.kernels.interface import KV
from flashcp.sharding.exchanges import traffic
from flashcp.sharding.plan import ShardingPlan

__all__ = ["Exact"]


class Exact(ReceivingExchange):
    """See the module. Ranks that send or receive nothing still take part."""

    name = "exact"

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport)
        self._traffic = lru_cache(maxsize=4)(traffic)

    def start(self, plan: ShardingPlan, k: Tensor, v: Tensor) -> IncomingKV:
        layout, rows, own = self.layout(plan), self._traffic(plan), self.transport.rank
        sent, received = rows[own].tolist(), rows[:, own].tolist()
        inbox = self.transport.inbox(sum(received), int(rows.sum(0).max()), (2, *k.shape[1:]), k)  # [R, 2, K, D]
        outgoing = OutgoingRows(KV(k, v), layout.sent_index(k.device))
        before = rows[:own].sum(0).tolist()
        return layout.incoming(self.transport.all_to_all(outgoing, sent, inbox, received, before), inbox)

    def return_gradients(self, plan: ShardingPlan, gradients: Tensor) -> GradientReturn:
        """The way back is the same exchange with senders and readers exchanged."""
        layout, rows, own = self.layout(plan), self._traffic(plan), self.transport.rank
        sent, received = rows[own].tolist(), rows[:, own].tolist()
        inbox = self.transport.inbox(sum(sent), int(rows.sum(1).max()), gradients.shape[1:], gradients)
        before = rows[:, :own].sum(1).tolist()
        outgoing = OutgoingRows(gradients, what="gradients")
        transfer = self.transport.all_to_all(outgoing, received, inbox, sent, before)
        starts = np.cumsum([0, *sent[:-1]]).tolist()
        slots = list(zip(starts, layout.sent_index(gradients.device).split(sent), strict=True))
        return returned_slots(self.transport, transfer, inbox, slots)
