"""`compacted` and `all_gather`: blocks of KV, padded to the largest rank's, from every rank to every rank.

They differ in the rows that a block holds (`flashcp.sharding.exchanges`). Gradients come home by the reduce-scatter
that mirrors the all-gather: each block to its owner, where they are added in rank order in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashcp.comm.exchanges.flight import Flight, OneArrival
from flashcp.comm.exchanges.homecoming import ReturnedRows
from flashcp.comm.exchanges.receiving import ReceivingExchange
from flashcp.comm.rows import ChosenRows, WholeRows
from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.plan import ShardingPlan

__all__ = ["AllGather", "Compacted"]


class _Gathered(ReceivingExchange):
    def start(self, plan: ShardingPlan, k: Tensor, v: Tensor) -> Flight:
        """See Exchange."""
        layout, rows = self.layout(plan), self._block_rows(plan)
        index, total = layout.sent_index(k.device), rows * plan.world_size
        block = k.new_zeros((rows, 2, *k.shape[1:]))
        ChosenRows((k, v), index).write(block[: len(index)], 0, len(index))
        inbox = self.transport.inbox(total, total, block.shape[1:], k)
        return OneArrival(self.transport.all_gather(WholeRows(block), inbox), inbox, layout)

    def return_gradients(self, plan: ShardingPlan, gradients: Tensor) -> ReturnedRows:
        """See ReceivingExchange. A rank's own block stays at home: it read those rows from its local tensor."""
        index, rows, own = self.layout(plan).sent_index(gradients.device), self._block_rows(plan), self.transport.rank
        others = [rank for rank in range(plan.world_size) if rank != own]
        counts = [rows * (rank != own) for rank in range(plan.world_size)]
        leaving = torch.cat((gradients[: rows * own], gradients[rows * (own + 1) :]))
        total = rows * len(others)
        inbox = self.transport.inbox(total, total, gradients.shape[1:], gradients)
        offsets = [rows * (own - (own > rank)) for rank in range(plan.world_size)]
        arrival = self.transport.all_to_all(WholeRows(leaving, "gradients"), counts, inbox, counts, offsets)
        return ReturnedRows(arrival, inbox, [(rows * i, index) for i in range(len(others))], self.transport)

    def _block_rows(self, plan: ShardingPlan) -> int:
        return EXCHANGES[self.name].block_rows(plan)


class Compacted(_Gathered):
    """The paper's exchange: non-last rows only."""

    name = "compacted"


class AllGather(_Gathered):
    """Llama 3's exchange: all rows."""

    name = "all_gather"
