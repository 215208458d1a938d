"""The way of one attention call that most exchanges share: receive KV, attend, send gradients home.

    start             this rank's K and V rows leave (each exchange in its own way)
    forward           attend as rows arrive: all at once, part by part, or waiting inside the kernel
    return_gradients  there is a place for gradients that come home
    backward          gradients of received rows first; they leave for the rows' owners source by source, as the kernel
                      finishes them (in the exchange's own way), and travel while the local ones are computed
    add_to            the owner adds what came home, in fp32

Shapes: T local rows, R rows of the receive buffer, H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from flashcp.comm.clock import span
from flashcp.comm.exchanges.exchange import AttentionSettings, Exchange, IncomingKV, InputGradients, Saved, as_kv
from flashcp.kernels.interface import KV, OnReceived
from flashcp.kernels.schedule import Schedule
from flashcp.kernels.sinks import add_sinks, sink_gradients
from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.plan import ShardingPlan


class GradientReturn(NamedTuple):
    """Gradients on their way to the owners of the rows.

    dtype: that they are computed in. leave: those of a source's rows may leave, or all that have not left yet. finish:
    waits for all, here and there. add_to: waits, adds what arrived to the local gradients, source by source in a fixed
    order, and frees the inbox.
    """

    dtype: torch.dtype
    leave: OnReceived
    finish: Callable[[], None]
    add_to: Callable[[KV], None]


class ReceivingExchange(Exchange):
    """Exchanges that bring others' KV rows into a receive buffer; queries stay where they are."""

    def forward(
        self, plan: ShardingPlan, q: Tensor, local: KV, incoming: IncomingKV, settings: AttentionSettings
    ) -> tuple[Tensor, Saved]:
        """`none` waits for all rows and computes in one launch, `staged` computes local rows meanwhile and merges part
        by part in fp32, `fused` waits inside its one launch."""
        alone = self.transport.world_size == 1  # nothing arrives that a part could wait for
        attend = self._staged if settings.overlap == "staged" and not alone else self._at_once
        out, lse = attend(plan, q, local, incoming, settings)
        if settings.scores.sinks is not None:
            out, lse = add_sinks(out, lse, settings.scores.sinks)
        out = out.to(q.dtype)
        with settings.clock.measure("exposed_exchange_ms"):
            incoming.transfer.finish()  # rows that nobody reads here, too: the region is free only when all landed
        rows, ticket, _ = incoming.inbox
        return out, self.held(Saved(q, *local, out, lse, rows, torch.tensor([ticket])), settings)

    def _at_once(
        self, plan: ShardingPlan, q: Tensor, local: KV, incoming: IncomingKV, settings: AttentionSettings
    ) -> tuple[Tensor, Tensor]:
        """Output [T, H, D] in q's dtype and log-sum-exp [T, H], by one launch."""
        settings.meet()
        flags = incoming.transfer.flags() if settings.overlap == "fused" else None
        if flags is None:
            with settings.clock.measure("exposed_exchange_ms"):
                incoming.transfer.wait()
        with settings.clock.measure("attention_ms", "all tiles, waits inside" if flags else "all tiles"):
            received, schedule = as_kv(incoming.inbox.rows), self.layout(plan).schedule
            out, lse = settings.kernel.attend(
                q, local, received, schedule, settings.scores.scale, flags, settings.scores.softcap
            )
        if flags:
            self.transport.check(flags)
        return out, lse

    def _staged(
        self, plan: ShardingPlan, q: Tensor, local: KV, incoming: IncomingKV, settings: AttentionSettings
    ) -> tuple[Tensor, Tensor]:
        """The same in fp32, by one launch for the local rows and one for each part as it arrives."""
        out = q.new_zeros(q.shape, dtype=torch.float32)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        received = as_kv(incoming.inbox.rows)

        def add(schedule: Schedule, tiles: str) -> None:
            with settings.clock.measure("attention_ms", tiles):
                settings.kernel.merge_into(
                    out, lse, q, local, received, schedule, settings.scores.scale, settings.scores.softcap
                )

        add(self.layout(plan).local_schedule, "local tiles")
        settings.meet()
        parts = incoming.parts(settings.stages if self.transport.one_sided else 1)
        while True:
            with settings.clock.measure("exposed_exchange_ms"):
                schedule = next(parts, None)
            if schedule is None:
                return out, lse
            add(schedule, f"remote tiles (from {', '.join(map(str, schedule.sources)) or 'nobody'})")

    def backward(
        self, plan: ShardingPlan, grad_out: Tensor, saved: Saved, settings: AttentionSettings
    ) -> InputGradients:
        """Gradients of received rows first: they travel while the local ones are computed."""
        if not self.is_open(saved):
            with settings.clock.measure("exposed_exchange_ms", "send rows"):
                incoming = self.start(plan, saved.k, saved.v)
            settings.meet()
            with settings.clock.measure("exposed_exchange_ms"):
                incoming.transfer.finish()
            saved = saved._replace(received=incoming.inbox.rows, tickets=torch.tensor([incoming.inbox.ticket]))
        assert saved.received is not None
        wire = settings.wire(saved.k.dtype, EXCHANGES[self.name].roundings)
        with settings.clock.measure("exposed_exchange_ms", "send gradients"):
            returned = self.return_gradients(plan, saved.received.new_empty((0, *saved.received.shape[1:]), dtype=wire))

        def on_received(gradients: Tensor, source: int | None = None) -> None:
            tiles.close()  # the span in the trace ends here, and the next one begins below
            with settings.clock.measure("exposed_exchange_ms", "send gradients"):
                returned.leave(gradients, source)
                if source is None and settings.overlap == "none":
                    settings.agree()
                    returned.finish()
            tiles.enter_context(span("gradients of local tiles" if source is None else "gradients of remote tiles"))

        with settings.clock.measure("attention_ms"), ExitStack() as tiles:
            tiles.enter_context(span("gradients of remote tiles"))
            local, received, schedule = KV(saved.k, saved.v), as_kv(saved.received), self.layout(plan).schedule
            scale, softcap, sinks = settings.scores
            gradients = settings.kernel.gradients(
                grad_out, saved.q, local, received, saved.out, saved.lse, schedule, scale, torch.float32, on_received,
                returned.dtype, softcap,
            )  # fmt: skip
        self.release(saved)
        settings.meet()
        with settings.clock.measure("exposed_exchange_ms", "gradients home"):
            returned.add_to(gradients.local)
        of_sinks = None if sinks is None else sink_gradients(saved.out, grad_out, saved.lse, sinks)
        return InputGradients(gradients.q, *gradients.local, of_sinks)

    def send_home(self, plan: ShardingPlan, gradients: Tensor, settings: AttentionSettings) -> KV:
        """Gradients of the receive buffer [R, 2, K, D] to the rows' owners: what came for this rank's own rows, in
        fp32 [T, K, D] each."""
        wire = settings.wire(gradients.dtype, EXCHANGES[self.name].roundings)
        shape, wide = gradients.shape[1:], torch.promote_types(gradients.dtype, torch.float32)
        tokens = self.tokens(plan)
        local = KV(*(gradients.new_zeros((tokens, *shape[1:]), dtype=wide) for _ in range(2)))
        with settings.clock.measure("exposed_exchange_ms", "gradients home"):
            returned = self.return_gradients(plan, gradients.new_empty((0, *shape), dtype=wire))
            returned.leave(gradients.to(returned.dtype))
            settings.meet()
            returned.add_to(local)
        return local

    @abstractmethod
    def return_gradients(self, plan: ShardingPlan, like: Tensor) -> GradientReturn:
        """Make ready to send the gradients of the receive buffer [R, 2, K, D] home. like: [0, 2, K, D], their dtype on
        the way."""
