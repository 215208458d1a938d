"""The way of one attention call that most exchanges share: receive KV, attend, send gradients home.

    start             this rank's K and V rows leave (each exchange in its own way)
    forward           attend as rows arrive: all at once, part by part, or waiting inside the kernel
    backward          gradients of received rows first
    return_gradients  they leave for the rows' owners while the local ones are computed (in the exchange's own way)
    add_to            the owner adds what came home

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
from flashcp.comm.exchanges.exchange import AttentionSettings, Exchange, IncomingKV, Saved, as_kv
from flashcp.comm.transport import Transfer
from flashcp.kernels.interface import KV
from flashcp.kernels.schedule import Schedule
from flashcp.sharding.plan import ShardingPlan


class GradientReturn(NamedTuple):
    """Gradients on their way to the owners of the rows.

    add_to: waits, adds what arrived to the local gradients, source by source in a fixed order, and frees the inbox.
    """

    transfer: Transfer
    add_to: Callable[[KV], None]


class ReceivingExchange(Exchange):
    """Exchanges that bring others' KV rows into a receive buffer; queries stay where they are."""

    def forward(
        self, plan: ShardingPlan, q: Tensor, local: KV, incoming: IncomingKV, settings: AttentionSettings, scale: float
    ) -> tuple[Tensor, Saved]:
        """`none` waits for all rows and computes in one launch, `staged` computes local rows meanwhile and merges part
        by part in fp32, `fused` waits inside its one launch."""
        alone = self.transport.world_size == 1  # nothing arrives that a part could wait for
        attend = self._staged if settings.overlap == "staged" and not alone else self._at_once
        out, lse = attend(plan, q, local, incoming, settings, scale)
        with settings.clock.measure("exposed_exchange_ms"):
            incoming.transfer.finish()  # rows that nobody reads here, too: the region is free only when all landed
        rows, ticket = incoming.inbox
        return out, self.held(Saved(q, *local, out, lse, rows, torch.tensor([ticket])), settings)

    def _at_once(
        self, plan: ShardingPlan, q: Tensor, local: KV, incoming: IncomingKV, settings: AttentionSettings, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output [T, H, D] in q's dtype and log-sum-exp [T, H], by one launch."""
        settings.meet()
        flags = incoming.transfer.flags() if settings.overlap == "fused" else None
        if flags is None:
            with settings.clock.measure("exposed_exchange_ms"):
                incoming.transfer.wait()
        with settings.clock.measure("attention_ms", "all tiles, waits inside" if flags else "all tiles"):
            received, schedule = as_kv(incoming.inbox.rows), self.layout(plan).schedule
            out, lse = settings.kernel.attend(q, local, received, schedule, scale, flags)
        if flags:
            self.transport.check(flags)
        return out, lse

    def _staged(
        self, plan: ShardingPlan, q: Tensor, local: KV, incoming: IncomingKV, settings: AttentionSettings, scale: float
    ) -> tuple[Tensor, Tensor]:
        """The same, by one launch for the local rows and one for each part as it arrives."""
        out = q.new_zeros(q.shape, dtype=torch.float32)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        received = as_kv(incoming.inbox.rows)

        def add(schedule: Schedule, tiles: str) -> None:
            with settings.clock.measure("attention_ms", tiles):
                settings.kernel.merge_into(out, lse, q, local, received, schedule, scale)

        add(self.layout(plan).local_schedule, "local tiles")
        settings.meet()
        parts = incoming.parts(settings.stages if self.transport.one_sided else 1)
        while True:
            with settings.clock.measure("exposed_exchange_ms"):
                schedule = next(parts, None)
            if schedule is None:
                return out.to(q.dtype), lse
            add(schedule, f"remote tiles (from {', '.join(map(str, schedule.sources)) or 'nobody'})")

    def backward(
        self, plan: ShardingPlan, grad_out: Tensor, saved: Saved, settings: AttentionSettings, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of received rows first: they travel while the local ones are computed."""
        if not self.is_open(saved):
            with settings.clock.measure("exposed_exchange_ms", "send rows"):
                incoming = self.start(plan, saved.k, saved.v)
            settings.meet()
            with settings.clock.measure("exposed_exchange_ms"):
                incoming.transfer.finish()
            saved = saved._replace(received=incoming.inbox.rows, tickets=torch.tensor([incoming.inbox.ticket]))
        assert saved.received is not None
        returned: GradientReturn | None = None

        def send_home(gradients: Tensor) -> None:
            nonlocal returned
            tiles.close()
            with settings.clock.measure("exposed_exchange_ms", "send gradients"):
                returned = self.return_gradients(plan, gradients)
                if settings.overlap == "none":
                    settings.agree()
                    returned.transfer.finish()
            tiles.enter_context(span("gradients of local tiles"))

        with settings.clock.measure("attention_ms"), ExitStack() as tiles:
            tiles.enter_context(span("gradients of remote tiles"))
            local, received, schedule = KV(saved.k, saved.v), as_kv(saved.received), self.layout(plan).schedule
            gradients = settings.kernel.gradients(
                grad_out, saved.q, local, received, saved.out, saved.lse, schedule, scale, torch.float32, send_home
            )
        self.release(saved)
        assert returned is not None
        settings.meet()
        with settings.clock.measure("exposed_exchange_ms", "gradients home"):
            returned.add_to(gradients.local)
        return gradients.q, *gradients.local

    @abstractmethod
    def return_gradients(self, plan: ShardingPlan, gradients: Tensor) -> GradientReturn:
        """Send the gradients of the receive buffer, fp32 [R, 2, K, D], home."""
