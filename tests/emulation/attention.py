"""Attention as kernels of an emulated device: the CPU's arithmetic, in launches that hold every SM."""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np
import torch
from torch import Tensor

from flashcp.kernels.cpu import CpuAttention
from flashcp.kernels.interface import KV, AttentionKernel, Gradients, OnReceived, WaitFlags
from flashcp.kernels.schedule import Schedule
from tests.emulation.device import EmulatedDevice
from tests.emulation.world import Wait

__all__ = ["EmulatedAttention"]

CPU = CpuAttention()


class EmulatedAttention(AttentionKernel):
    """A grid is larger than the device: each launch takes all SMs and keeps them until it ends, so that whatever it
    waits for must come without one."""

    def __init__(self, device: EmulatedDevice) -> None:
        self.device = device

    def merge_into(
        self,
        out: Tensor,
        lse: Tensor,
        q: Tensor,
        local: KV,
        received: KV,
        schedule: Schedule,
        scale: float,
        softcap: float = 0.0,
    ) -> None:
        def run(q: Tensor, k: Tensor, v: Tensor, rk: Tensor, rv: Tensor, out: Tensor, lse: Tensor) -> None:
            CPU.merge_into(out, lse, q, KV(k, v), KV(rk, rv), schedule, scale, softcap)

        self._launch("attention", run, (q, *local, *received, out, lse))

    def attend(
        self,
        q: Tensor,
        local: KV,
        received: KV,
        schedule: Schedule,
        scale: float,
        flags: WaitFlags | None = None,
        softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """With flags: a kernel that spins."""
        out, lse = self._empty(q.shape, q.dtype), self._empty(q.shape[:2], torch.float32)
        tensors = (q, *local, *received, out, lse)
        if flags is None:

            def run(q: Tensor, k: Tensor, v: Tensor, rk: Tensor, rv: Tensor, out: Tensor, lse: Tensor) -> None:
                found = CPU.attend(q, KV(k, v), KV(rk, rv), schedule, scale, softcap=softcap)
                for target, value in zip((out, lse), found, strict=True):
                    target.copy_(value)

            self._launch("attention", run, tensors)
        else:
            epoch = flags.epoch
            self._launch(
                "attention that spins",
                lambda *x: _spin(*x, schedule=schedule, how=(scale, softcap), epoch=epoch),
                (*tensors, flags.flags, flags.stuck),
            )
        return out, lse

    def gradients(
        self,
        grad_out: Tensor,
        q: Tensor,
        local: KV,
        received: KV,
        out: Tensor,
        lse: Tensor,
        schedule: Schedule,
        scale: float,
        local_dtype: torch.dtype | None = None,
        on_received: OnReceived | None = None,
        received_dtype: torch.dtype = torch.float32,
        softcap: float = 0.0,
    ) -> Gradients:
        """One launch for what goes home, one for the rest."""
        back = self._empty((len(received.k), 2, *received.k.shape[1:]), received_dtype)
        grad_q = self._empty(q.shape, q.dtype)
        grad_local = KV(*(self._empty(x.shape, local_dtype or x.dtype) for x in local))
        inputs = (grad_out, q, *local, *received, out, lse)

        def all_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Gradients:
            received, out, lse = KV(*rest[:2]), rest[2], rest[3]
            return CPU.gradients(
                grad, q, KV(k, v), received, out, lse, schedule, scale, local_dtype, softcap=softcap
            )

        def first(*x: Tensor) -> None:
            x[-1].copy_(all_gradients(*x[:-1]).received)

        def second(*x: Tensor) -> None:
            found = all_gradients(*x[:-3])
            for target, value in zip(x[-3:], (found.q, *found.local), strict=True):
                target.copy_(value)

        self._launch("gradients of received rows", first, (*inputs, back))
        if on_received is not None:
            on_received(back)
        self._launch("gradients of local rows", second, (*inputs, grad_q, *grad_local))
        return Gradients(grad_q, grad_local, back)

    def _launch(
        self, what: str, run: Callable[..., Generator[Wait, bool, None] | None], tensors: tuple[Tensor, ...]
    ) -> None:
        @torch.no_grad()
        def quietly(*x: Tensor) -> Generator[Wait, bool, None] | None:
            return run(*x)

        self.device.kernel(what, quietly, tensors, sms=self.device.sms)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.device.empty(shape, dtype, "a result of attention")


def _spin(
    q: Tensor, k: Tensor, v: Tensor, rk: Tensor, rv: Tensor, out: Tensor, lse: Tensor, flags: Tensor, stuck: Tensor,
    *, schedule: Schedule, how: tuple[float, float], epoch: int,
) -> Generator[Wait, bool, None]:  # fmt: skip
    """Local ranges, then those of each source once its flag is up; after a time-out nobody waits any more."""
    total = torch.zeros(q.shape)
    sums = torch.full(q.shape[:2], -torch.inf)
    local, received = KV(k, v), KV(rk, rv)
    CPU.merge_into(total, sums, q, local, received, schedule.part(~schedule.received), *how)
    for source in np.unique(schedule.source[schedule.received]).tolist():
        if not stuck[0]:
            came = yield (
                lambda source=source: int(flags[source]) >= epoch,
                f"the rows of rank {source} (epoch {epoch})",
            )
            if not came:
                stuck[0] = source + 1
        part = schedule.part(schedule.received & (schedule.source == source))
        with torch.no_grad():
            CPU.merge_into(total, sums, q, local, received, part, *how)
    out.copy_(total)
    lse.copy_(sums)
