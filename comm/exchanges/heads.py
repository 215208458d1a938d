"""Head ranks: inside a holder an all-to-all turns a split by rows into a split by heads, and back.

    [T, all heads] of each rank -> [C, 1/h of the heads] of each rank: the C rows of the h ranks of a holder, in the
    holder's order, so that a document which a holder has whole is one range
    attention between holders, by any exchange, with the ranks of the same place in other holders
    [C, 1/h of the heads] -> [T, all heads]

The backward is the mirror. What travels inside a holder are whole gradients, in the model's dtype; only a KV head that
several ranks were sent comes home from each of them, in the wire's dtype, and its owner adds them in fp32.

`ulysses` is this and nothing else: one holder of all ranks, in which a rank has the rows that a plan gives it.

Shapes: T rank's rows, C holder's rows, h ranks of a holder, H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from einops import repeat
from torch import Tensor

from flashcp.comm.exchanges.exchange import (
    AttentionSettings,
    Exchange,
    IncomingKV,
    InputGradients,
    Layout,
    Saved,
    as_kv,
)
from flashcp.comm.exchanges.receiving import GradientReturn, ReceivingExchange
from flashcp.comm.transport import Alone, Inbox, OutgoingRows, Transfer, Transport
from flashcp.kernels.interface import KV
from flashcp.kernels.uploads import Uploaded
from flashcp.sharding.holders import inner_roundings, members_heads, members_rows
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.shards import ShardTable


class Heads(Exchange):
    """transport: inside the holder. between: the exchange between holders, whose transport joins the ranks of the same
    place. meet: returns when this rank's holder agrees, and all ranks where that must be before rows leave it.

    What arrived inside the holder is kept for the backward in place of q, k and v: where it lies, or, with `refetch`,
    which is for small receive buffers, as a copy.
    """

    moves_later = True
    inputs_wait = False

    def __init__(
        self, transport: Transport, between: Exchange, meet: Callable[[], None], refetch: bool = False
    ) -> None:
        super().__init__(transport, meet)
        self.name, self.between, self.refetch = between.name, between, refetch

    @property
    def puts(self) -> bool:
        return self.transport.one_sided or self.between.puts

    def tokens(self, plan: ShardingPlan) -> int:
        return self.members(plan)[self.transport.rank]

    def members(self, plan: ShardingPlan) -> list[int]:
        """How many rows each rank of the holder has."""
        return members_rows(self.between.tokens(plan), self.transport.world_size).tolist()

    def check(self, query_heads: int, kv_heads: int) -> None:
        self.between.check(*members_heads(query_heads, kv_heads, self.transport.world_size))

    def start(self, plan: ShardingPlan, k: Tensor, v: Tensor) -> IncomingKV:
        """K and V travel on to other holders as soon as they are here: they wait for no queries."""
        incoming = self._to_heads(plan, (k, v))
        if self.between.transport.world_size == 1:
            return incoming
        local, onward = self._travel_on(plan, incoming)
        return IncomingKV(onward.inbox, onward.transfer, onward=(local, onward))

    def forward(
        self, plan: ShardingPlan, q: Tensor, local: KV, incoming: IncomingKV, settings: AttentionSettings
    ) -> tuple[Tensor, Saved]:
        with settings.clock.measure("exposed_exchange_ms", "send queries"):
            asked = self._to_heads(plan, (q,), "queries")
            local, onward = incoming.onward or self._travel_on(plan, incoming)
            self.meet()
            queries = self._landed(plan, asked)[:, 0]  # [C, H / h, D]
        out, saved = self.between.forward(plan, queries, local, onward, self._of_rank(settings))
        with settings.clock.measure("exposed_exchange_ms", "send outputs"):
            (outputs,) = self._to_rows(plan, out, [out.shape[1]], "outputs")
        return outputs, saved

    def backward(
        self, plan: ShardingPlan, grad_out: Tensor, saved: Saved, settings: AttentionSettings
    ) -> InputGradients:
        with settings.clock.measure("exposed_exchange_ms", "send gradients of outputs"):
            pulled = self._to_heads(plan, (grad_out,), "gradients")
            self.meet()
            grad_heads = self._landed(plan, pulled, kept=False)[:, 0]  # [C, H / h, D]
        ranks = self.transport.world_size
        of_q, *of_kv, own = self.between.backward(plan, grad_heads, saved, self._of_rank(settings))
        self.transport.free(pulled.inbox.ticket)
        with settings.clock.measure("exposed_exchange_ms", "gradients home"):
            model = grad_out.dtype
            wire = settings.wire(model, inner_roundings(ranks, settings.kv_heads))
            widths = [gradient.shape[1] for gradient in of_kv]  # K / h, or 1, twice
            leaving = grad_out.new_empty((len(grad_heads), sum(widths), grad_out.shape[2]), dtype=wire)
            for part, gradient in zip(leaving.split(widths, dim=1), of_kv, strict=True):
                part.copy_(gradient)
            # Queries' leave as the kernel wrote them: side by side with the others they would be copied.
            (grad_q,) = self._to_rows(plan, of_q.to(model), [of_q.shape[1]], "gradients")
            grad_k, grad_v = self._to_rows(plan, leaving, widths, "gradients")
        grad_k, grad_v = (_sum_parts(part, settings.kv_heads) for part in (grad_k, grad_v))
        of_sinks = None
        if own is not None:  # of this rank's heads, over all rows of the holder; other ranks have the others'
            of_sinks = own.new_zeros(ranks, len(own))
            of_sinks[self.transport.rank] = own
            of_sinks = of_sinks.flatten()
        return InputGradients(grad_q, grad_k, grad_v, of_sinks)

    def log_sums(self, plan: ShardingPlan, saved: Saved) -> Tensor:
        lse = self.between.log_sums(plan, saved)  # [C, H / h]: an exchange between holders may share out heads too
        (home,) = self._to_rows(plan, lse[..., None], [lse.shape[1]], "log-sum-exp")
        return home[..., 0]

    def release(self, saved: Saved) -> None:
        self.between.release(saved)

    def order(self, plan: ShardingPlan, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Where in the order of attention the rows lie as they arrive, and the inverse; None: they arrive in it."""
        return None

    def _of_rank(self, settings: AttentionSettings) -> AttentionSettings:
        """For this rank's share of the heads."""
        scores, ranks = settings.scores, self.transport.world_size
        if scores.sinks is not None:
            scores = scores._replace(sinks=scores.sinks.unflatten(0, (ranks, -1))[self.transport.rank])
        return replace(settings, kv_heads=max(1, settings.kv_heads // ranks), scores=scores)

    def _travel_on(self, plan: ShardingPlan, incoming: IncomingKV) -> tuple[KV, IncomingKV]:
        self.meet()
        local = as_kv(self._landed(plan, incoming))  # [C, K / h, D] each
        return local, self.between.start(plan, *local)

    def _to_heads(self, plan: ShardingPlan, tensors: Sequence[Tensor], what: str = "rows") -> IncomingKV:
        """[T, heads, D] each -> [C, tensors, heads of this rank, D], on its way. Fewer heads than ranks go to several
        each."""
        ranks, own, tokens = self.transport.world_size, self.transport.rank, self.members(plan)
        copies = max(1, ranks // tensors[0].shape[1])
        parts = [repeat(x, "t (n k) d -> n c t k d", n=ranks // copies, c=copies) for x in tensors]  # views
        leaving = torch.stack(parts, dim=3).flatten(0, 2)  # the one copy
        inbox = self.transport.inbox(sum(tokens), sum(tokens), leaving.shape[1:], leaving)
        sent, offsets = [tokens[own]] * ranks, [sum(tokens[:own])] * ranks
        return IncomingKV(
            inbox, self.transport.all_to_all(OutgoingRows(leaving, what=what), sent, inbox, tokens, offsets)
        )

    def _to_rows(self, plan: ShardingPlan, rows: Tensor, widths: list[int], what: str) -> list[Tensor]:
        """[C, heads of a rank, D], tensors of so many heads side by side -> of each tensor [T, all heads, D]."""
        ranks, own, tokens = self.transport.world_size, self.transport.rank, self.members(plan)
        inbox = self.transport.inbox(tokens[own] * ranks, max(tokens) * ranks, rows.shape[1:], rows)
        offsets = [count * own for count in tokens]
        order = self.order(plan, rows.device)
        leaving = OutgoingRows(rows[order[0]] if order else rows.contiguous(), what=what)
        transfer = self.transport.all_to_all(leaving, tokens, inbox, [tokens[own]] * ranks, offsets)
        transfer.finish()
        parts = inbox.rows.unflatten(0, (ranks, tokens[own])).split(widths, dim=2)
        home = [torch.cat(part.unbind(0), dim=1) for part in parts]
        self.transport.free(inbox.ticket)
        return home

    def _landed(self, plan: ShardingPlan, incoming: IncomingKV, kept: bool = True) -> Tensor:
        """The rows of an inbox, once they are there and this rank's have left, in the order of attention. kept: for the
        backward; an inbox in which they lie until then is free when nothing holds its memory any more. Else the caller
        frees it when it has read them."""
        rows, ticket, _ = incoming.inbox
        incoming.transfer.finish()
        if (order := self.order(plan, rows.device)) is not None:
            rows = rows[order[1]]
        elif kept and ticket and self.refetch:
            rows = rows.clone()
        else:
            return rows
        if kept:
            self.transport.free(ticket)
        return rows


class Ulysses(Heads):
    """DeepSpeed-Ulysses (arXiv 2309.14509): every rank computes every row of the pack for its share of the heads.

    A plan of all ranks says who holds which rows, and nothing else: attention has them in the order of the pack.
    """

    name = "ulysses"
    splits_heads = True

    def __init__(self, transport: Transport, meet: Callable[[], None]) -> None:
        super().__init__(transport, WholePack(Alone(), meet), meet)
        self._orders = lru_cache(maxsize=4)(_pack_order)

    def order(self, plan: ShardingPlan, device: torch.device) -> tuple[Tensor, Tensor] | None:
        there, back = self._orders(plan, device)
        return there.here(), back.here()

    def members(self, plan: ShardingPlan) -> list[int]:
        return plan.tokens.tolist()


class WholePack(ReceivingExchange):
    """All rows of the pack are here: there is nobody to exchange anything with."""

    name = "ulysses"

    def __init__(self, transport: Alone, meet: Callable[[], None]) -> None:
        super().__init__(transport, meet)
        self.layout = lru_cache(maxsize=4)(
            lambda plan: Layout("exact", replace(plan, world_size=1, table=_on_one(plan)), 0)
        )

    def tokens(self, plan: ShardingPlan) -> int:
        return int(plan.offsets[-1])

    def start(self, plan: ShardingPlan, k: Tensor, v: Tensor) -> IncomingKV:
        return IncomingKV(Inbox(k.new_empty((0, 2, *k.shape[1:]))), Transfer())

    def return_gradients(self, plan: ShardingPlan, like: Tensor) -> GradientReturn:
        return GradientReturn(like.dtype, lambda gradients, source=None: None, lambda: None, lambda local: None)


def _on_one(plan: ShardingPlan) -> ShardTable:
    """The shards of a plan, all on one rank."""
    return plan.table._replace(rank=np.zeros_like(plan.table.rank))


def _pack_order(plan: ShardingPlan, device: torch.device) -> tuple[Uploaded, Uploaded]:
    """Row of the pack of every row as they arrive, rank by rank, and the inverse, int64 [C]."""
    arriving = np.concatenate([plan.rows(rank) for rank in range(plan.world_size)])
    return Uploaded(arriving, device), Uploaded(np.argsort(arriving), device)


def _sum_parts(gradient: Tensor, heads: int) -> Tensor:
    """[T, K, D] of [T, parts of K heads, D], where several ranks computed on one KV head; in fp32."""
    return gradient if gradient.shape[1] == heads else gradient.unflatten(1, (heads, -1)).float().sum(2)
