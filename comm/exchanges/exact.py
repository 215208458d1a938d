"""`exact`: each rank sends to each other only the rows that one reads."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from torch import Tensor

from flashcp.comm.exchanges.flight import Flight, OneArrival
from flashcp.comm.exchanges.homecoming import ReturnedRows
from flashcp.comm.exchanges.receiving import ReceivingExchange
from flashcp.comm.rows import ChosenRows, WholeRows
from flashcp.comm.transport import Transport
from flashcp.sharding.exchanges.exact import traffic
from flashcp.sharding.plan import ShardingPlan

__all__ = ["Exact"]


class Exact(ReceivingExchange):
    """See the module. Ranks that send or receive nothing still take part."""

    name = "exact"

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport)
        self._traffic = lru_cache(maxsize=4)(traffic)

    def start(self, plan: ShardingPlan, k: Tensor, v: Tensor) -> Flight:
        """See Exchange."""
        layout, rows, own = self.layout(plan), self._traffic(plan), self.transport.rank
        sent, received = rows[own].tolist(), rows[:, own].tolist()
        inbox = self.transport.inbox(sum(received), int(rows.sum(0).max()), (2, *k.shape[1:]), k)
        leaving = ChosenRows((k, v), layout.sent_index(k.device))
        before = rows[:own].sum(0).tolist()
        return OneArrival(self.transport.all_to_all(leaving, sent, inbox, received, before), inbox, layout)

    def return_gradients(self, plan: ShardingPlan, gradients: Tensor) -> ReturnedRows:
        """See ReceivingExchange: the way back is the same exchange with senders and readers exchanged."""
        layout, rows, own = self.layout(plan), self._traffic(plan), self.transport.rank
        sent, received = rows[own].tolist(), rows[:, own].tolist()
        inbox = self.transport.inbox(sum(sent), int(rows.sum(1).max()), gradients.shape[1:], gradients)
        before = rows[:, :own].sum(1).tolist()
        arrival = self.transport.all_to_all(WholeRows(gradients, "gradients"), received, inbox, sent, before)
        starts = np.cumsum([0, *sent[:-1]]).tolist()
        slots = list(zip(starts, layout.sent_index(gradients.device).split(sent), strict=True))
        return ReturnedRows(arrival, inbox, slots, self.transport)
