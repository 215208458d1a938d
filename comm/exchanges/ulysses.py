"""`ulysses` (DeepSpeed-Ulysses): all-to-alls turn a split by tokens into a split by heads and back.

Each rank computes every row of the pack for its share of the heads, reading the rows in the order they arrived.
The gradients that travel back are whole, not partial sums, so the wire carries the model's dtype both ways.

Shapes: T local rows, C rows of the pack, N ranks, H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from flashcp.comm.exchanges.exchange import AttentionSettings, Exchange, IncomingKV, Saved, as_kv
from flashcp.comm.transport import OutgoingRows
from flashcp.kernels.interface import KV
from flashcp.sharding.plan import ShardingPlan


class Ulysses(Exchange):
    name = "ulysses"
    moves_later = True
    gradient_dtype = None
    splits_heads = True

    def start(self, plan: ShardingPlan, k: Tensor, v: Tensor) -> IncomingKV:
        return self._by_heads(plan, torch.stack((k, v), dim=1))

    def forward(
        self, plan: ShardingPlan, q: Tensor, local: KV, incoming: IncomingKV, settings: AttentionSettings, scale: float
    ) -> tuple[Tensor, Saved]:
        settings.meet()
        with settings.clock.measure("exposed_exchange_ms", "send queries"):
            asked = self._by_heads(plan, q[:, None], "queries")
            incoming.transfer.wait()
            asked.transfer.wait()
        queries, rows = asked.inbox.rows, incoming.inbox.rows  # [C, 1, H / N, D], [C, 2, K / N, D]
        with settings.clock.measure("attention_ms", "all tiles"):
            schedule = self.layout(plan).gathered_schedule
            out, lse = settings.kernel.attend(queries[:, 0], as_kv(rows), as_kv(rows[:0]), schedule, scale)
        with settings.clock.measure("exposed_exchange_ms", "send outputs"):
            own = self._by_tokens(plan, out[:, None], "outputs")[:, 0]
            incoming.transfer.leave()
            asked.transfer.leave()
        tickets = torch.tensor([asked.inbox.ticket, incoming.inbox.ticket])
        return own, self.held(Saved(q, *local, out, lse, rows, tickets, queries), settings)

    def backward(
        self, plan: ShardingPlan, grad_out: Tensor, saved: Saved, settings: AttentionSettings, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        settings.meet()
        with settings.clock.measure("exposed_exchange_ms", "send gradients of outputs"):
            pulled = self._by_heads(plan, grad_out[:, None], "gradients")
            if not self.is_open(saved):
                incoming, asked = self.start(plan, saved.k, saved.v), self._by_heads(plan, saved.q[:, None], "queries")
                for each in (incoming, asked):
                    each.transfer.finish()
                tickets = torch.tensor([asked.inbox.ticket, incoming.inbox.ticket])
                saved = saved._replace(received=incoming.inbox.rows, tickets=tickets, queries=asked.inbox.rows)
            pulled.transfer.finish()
        rows, queries, schedule = saved.received, saved.queries, self.layout(plan).gathered_schedule
        assert rows is not None
        assert queries is not None
        with settings.clock.measure("attention_ms", "gradients of all tiles"):
            grad_all, local, nothing = pulled.inbox.rows[:, 0], as_kv(rows), as_kv(rows[:0])
            gradients = settings.kernel.gradients(
                grad_all, queries[:, 0], local, nothing, saved.out, saved.lse, schedule, scale
            )
        self.transport.free(pulled.inbox.ticket)
        self.release(saved)
        with settings.clock.measure("exposed_exchange_ms", "gradients home"):
            grad_q = self._by_tokens(plan, gradients.q[:, None], "gradients")[:, 0]
            grad_k, grad_v = self._by_tokens(plan, torch.stack(gradients.local, dim=1), "gradients").unbind(1)
        return grad_q, grad_k, grad_v

    def _by_heads(self, plan: ShardingPlan, rows: Tensor, what: str = "rows") -> IncomingKV:
        """[T, tensors, heads, D] of all heads -> [C, tensors, heads / N, D] of this rank's, on its way."""
        ranks, own = plan.world_size, self.transport.rank
        outgoing = rearrange(rows, "t i (n h) d -> (n t) i h d", n=ranks).contiguous()
        tokens = plan.tokens.tolist()
        inbox = self.transport.inbox(sum(tokens), sum(tokens), outgoing.shape[1:], outgoing)
        offsets = [sum(tokens[:own])] * ranks
        sent = [tokens[own]] * ranks
        transfer = self.transport.all_to_all(OutgoingRows(outgoing, what=what), sent, inbox, tokens, offsets)
        return IncomingKV(inbox, transfer)

    def _by_tokens(self, plan: ShardingPlan, rows: Tensor, what: str) -> Tensor:
        """[C, tensors, heads / N, D] of this rank's heads -> [T, tensors, heads, D] of its rows."""
        ranks, own, tokens = plan.world_size, self.transport.rank, plan.tokens.tolist()
        inbox = self.transport.inbox(tokens[own] * ranks, max(tokens) * ranks, rows.shape[1:], rows)
        offsets = [count * own for count in tokens]
        outgoing = OutgoingRows(rows.contiguous(), what=what)
        self.transport.all_to_all(outgoing, tokens, inbox, [tokens[own]] * ranks, offsets).finish()
        whole = rearrange(inbox.rows, "(n t) i h d -> t i (n h) d", n=ranks).clone()
        self.transport.free(inbox.ticket)
        return whole
