"""`compacted` and `all_gather`: blocks of KV, padded to the largest rank's, from every rank to every rank.

They differ in the rows that a block holds (`flashcp.sharding.exchanges`). Gradients come home by the reduce-scatter
that mirrors the all-gather: each block to its owner, where they are added in rank order in fp32.

Shapes: T local rows, R rows of the receive buffer, K KV heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashcp.comm.exchanges.exchange import IncomingKV
from flashcp.comm.exchanges.receiving import GradientReturn, ReceivingExchange, returned_slots
from flashcp.comm.rows import OutgoingRows
from flashcp.kernels.interface import KV
from flashcp.sharding.plan import ShardingPlan

__all__ = ["AllGather", "Compacted"]


class AllGather(ReceivingExchange):
    """Llama 3's exchange: all rows."""

    name = "all_gather"

    def start(self, plan: ShardingPlan, k: Tensor, v: Tensor) -> IncomingKV:
        layout, rows = self.layout(plan), self._block_rows(plan)
        index, total = layout.sent_index(k.device), rows * plan.world_size
        block = k.new_zeros((rows, 2, *k.shape[1:]))  # [rows, 2, K, D]
        OutgoingRows(KV(k, v), index).write(block[: len(index)], 0, len(index))
        inbox = self.transport.inbox(total, total, block.shape[1:], k)
        return layout.incoming(self.transport.all_gather(OutgoingRows(block), inbox), inbox)

    def return_gradients(self, plan: ShardingPlan, gradients: Tensor) -> GradientReturn:
        """A rank's own block stays at home: it read those rows from its local tensor."""
        index, rows, own = self.layout(plan).sent_index(gradients.device), self._block_rows(plan), self.transport.rank
        others = [rank for rank in range(plan.world_size) if rank != own]
        counts = [rows * (rank != own) for rank in range(plan.world_size)]
        outgoing = torch.cat((gradients[: rows * own], gradients[rows * (own + 1) :]))  # [R - rows, 2, K, D]
        total = rows * len(others)
        inbox = self.transport.inbox(total, total, gradients.shape[1:], gradients)
        offsets = [rows * (own - (own > rank)) for rank in range(plan.world_size)]
        transfer = self.transport.all_to_all(OutgoingRows(outgoing, what="gradients"), counts, inbox, counts, offsets)
        return returned_slots(self.transport, transfer, inbox, [(rows * i, index) for i in range(len(others))])

    def _block_rows(self, plan: ShardingPlan) -> int:
        return plan.route(self.name).block_rows


class Compacted(AllGather):
    """The paper's exchange: non-last rows only."""

    name = "compacted"
