"""`ring`: at step k a rank computes on the block of rank r - k while the next one is on its way.

Partial results are merged in fp32. In the backward pass the gradient of a block goes round too: it starts at its
owner's successor, every rank adds its share in fp32, the last one hands it to the owner. The sum is rounded to
the wire's dtype at every hop, where other exchanges round a rank's share once.

Shapes: T local rows, R rows of the receive buffer, K KV heads, D head_dim.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from flashcp.comm.exchanges.exchange import IncomingKV
from flashcp.comm.exchanges.receiving import GradientReturn, ReceivingExchange
from flashcp.comm.transport import ALL, OutgoingRows, Transfer, Transport
from flashcp.kernels.interface import KV
from flashcp.kernels.schedule import Schedule
from flashcp.sharding.plan import ShardingPlan


class Ring(ReceivingExchange):
    name = "ring"
    moves_later = True

    def start(self, plan: ShardingPlan, k: Tensor, v: Tensor) -> IncomingKV:
        layout, ranks = self.layout(plan), plan.world_size
        sizes = [_blocks(plan, rank) for rank in range(ranks)]
        steps = _Steps(self.transport, sizes, (2, *k.shape[1:]), k)
        steps.shift(OutgoingRows(KV(k, v), layout.sent_index(k.device)))

        def blocks() -> Iterator[Schedule]:
            """One schedule a block; the block moves on before it is computed on."""
            for step in range(1, ranks):
                block = steps.wait()
                if step + 1 < ranks:
                    steps.shift(OutgoingRows(block))
                yield layout.schedule_of(((layout.rank - step) % ranks,))

        coming = blocks()
        return IncomingKV(steps.inbox, steps.as_one(lambda: deque(coming, maxlen=0)), lambda stages: coming)

    def return_gradients(self, plan: ShardingPlan, like: Tensor) -> GradientReturn:
        """The first hop leaves as soon as its block's gradients are finished; the others go round when rows come home.
        Shares stay in fp32 until they are added."""
        own = _blocks(plan, self.transport.rank)
        shares: list[Tensor] = []
        # What comes: the sums of all the blocks but a rank's first, then of its own.
        sizes = [[*_blocks(plan, rank)[1:], int(plan.tokens[rank])] for rank in range(plan.world_size)]
        steps = _Steps(self.transport, sizes, like.shape[1:], like)

        def leave(gradients: Tensor, source: int | None = None) -> None:
            if not shares and source in (None, (self.transport.rank - 1) % plan.world_size):
                shares.extend(gradients.split(own))
                steps.shift(OutgoingRows(shares[0].to(like.dtype), what="gradients"))

        def go_round() -> None:
            """Each hop adds this rank's share to the sum that arrived and hands it on; the last sum is its own."""
            for share in shares[1:]:
                steps.shift(OutgoingRows(steps.wait().add_(share), what="gradients"))
            steps.wait()

        transfer = steps.as_one(go_round)

        def add_to(local: KV) -> None:
            """The sum of all others' shares, in ring order, onto the owner's own."""
            transfer.finish()
            for total, part in zip(local, steps.wait().unbind(1), strict=True):
                total += part
            self.transport.free(steps.inbox.ticket)

        return GradientReturn(torch.promote_types(like.dtype, torch.float32), leave, transfer.finish, add_to)


def _blocks(plan: ShardingPlan, rank: int) -> list[int]:
    """Rows of the blocks that come to a rank, in order: those of rank - 1, rank - 2, ..., rank + 1."""
    ranks = plan.world_size
    return [int(plan.tokens[(rank - step) % ranks]) for step in range(1, ranks)]


class _Steps:
    """One shift after another through one inbox, which holds what arrives in order of arrival."""

    def __init__(self, transport: Transport, sizes: Sequence[list[int]], row: Sequence[int], like: Tensor) -> None:
        own, there = sizes[transport.rank], sizes[(transport.rank + 1) % transport.world_size]
        self._transport = transport
        self._stops, self._stops_there = ([0, *np.cumsum(part).tolist()] for part in (own, there))
        self.inbox = transport.inbox(sum(own), max(map(sum, sizes)), row, like, steps=len(own))
        self._started: list[Transfer] = []

    def shift(self, outgoing: OutgoingRows) -> None:
        """Hand on what the next rank has not got."""
        step = len(self._started)
        into = slice(self._stops[step], self._stops[step + 1])
        self._started.append(self._transport.shift(outgoing, self.inbox, step, into, self._stops_there[step]))

    def wait(self) -> Tensor:
        """The rows of the shift that was started last."""
        self._started[-1].wait()
        return self.inbox.rows[self._stops[len(self._started) - 1] : self._stops[len(self._started)]]

    def as_one(self, go_round: Callable[[], object]) -> Transfer:
        """All shifts as one transfer, whose rows have arrived when `go_round` returns."""

        def leave() -> None:
            for transfer in self._started:
                transfer.leave()

        return Transfer([ALL], lambda _: go_round(), leave)
