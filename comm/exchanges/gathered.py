"""`compacted` and `all_gather`: blocks of KV, padded to the largest rank's, from every rank to every rank.

They differ in the rows that a block holds (`flashcp.sharding.exchanges`). Gradients come home by the reduce-scatter
that mirrors the all-gather: each block to its owner, where they are added in rank order in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashcp.comm.exchanges.base import Flight, ReceivingExchange, ReturnedRows, pack_rows
from flashcp.comm.exchanges.exact import OneArrival
from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.plan import ShardingPlan

__all__ = ["AllGather", "Compacted"]


class _Gathered(ReceivingExchange):
    def start(self, plan: ShardingPlan, k: Tensor, v: Tensor) -> Flight:
        """See Exchange."""
        layout, rows = self.layout(plan), self._block_rows(plan)
        block = k.new_zeros((rows, 2, *k.shape[1:]))
        block[: len(layout.sent_index)] = pack_rows(k, v, layout.sent_index)
        buffer = k.new_empty((rows * plan.world_size, *block.shape[1:]))
        return OneArrival(self.transport.all_gather(block, buffer), buffer, layout)

    def return_gradients(self, plan: ShardingPlan, gradients: Tensor) -> ReturnedRows:
        """See ReceivingExchange. A rank's own block stays at home: it read those rows from its local tensor."""
        index, rows, own = self.layout(plan).sent_index, self._block_rows(plan), self.transport.rank
        counts = [rows * (rank != own) for rank in range(plan.world_size)]
        leaving = torch.cat((gradients[: rows * own], gradients[rows * (own + 1) :]))
        blocks = torch.empty_like(leaving)
        arrival = self.transport.all_to_all(leaving, counts, blocks, counts)
        slots = [block[: len(index)] for block in blocks.split([rows] * (plan.world_size - 1))]
        return ReturnedRows(arrival, slots, [index] * len(slots))

    def _block_rows(self, plan: ShardingPlan) -> int:
        return EXCHANGES[self.name].block_rows(plan)


class Compacted(_Gathered):
    """The paper's exchange: non-last rows only."""

    name = "compacted"


class AllGather(_Gathered):
    """Llama 3's exchange: all rows."""

    name = "all_gather"
