"""Attention of one rank of a plan, run and timed on the device at hand: its real schedule, on random rows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashcp.comm.exchanges.exchange import Layout
from flashcp.experiments.bench.accuracy import relative_error
from flashcp.experiments.bench.timing import Clock, median_us, own_clock
from flashcp.kernels.interface import KV, AttentionKernel
from flashcp.kernels.reference import reference_attention
from flashcp.kernels.schedule import Schedule, whole_pack_schedule
from flashcp.kernels.selection import select_attention
from flashcp.sharding.plan import ShardingPlan
from flashcp.simulator.cost import AttentionShape

__all__ = ["DTYPES", "KernelTimer", "RankSchedule", "gathered_schedule", "rank_schedule", "whole_schedule"]

DTYPES = {2: torch.bfloat16, 4: torch.float32}  # by a shape's dtype_bytes
LARGEST_ERRORS = {2: 1e-2, 4: 1e-4}  # of values and gradients, relative to float64
CHECKED = (1, 127, 129, 300)  # lengths of the pack that is compared


class RankSchedule(NamedTuple):
    """What one rank of a plan computes, and the rows of its receive buffer."""

    schedule: Schedule
    received_rows: int

    @property
    def query_rows(self) -> int:
        """Rows of its query shards."""
        return int((self.schedule.query_stop - self.schedule.query_start).sum())


def rank_schedule(plan: ShardingPlan, rank: int, sources: Collection[int] | None = None) -> RankSchedule | None:
    """A rank's schedule over the rows it reads, those of others received by the exact exchange.

    sources: only rows of these ranks, its own alone or others'. None where it reads nothing of them.
    """
    layout = Layout("exact", plan, rank)
    rows = int((layout.received.stop - layout.received.start).sum())
    if sources is None:
        return RankSchedule(layout.schedule, rows)
    if rank in sources:
        return RankSchedule(layout.local_schedule, rows)
    some = layout.schedule_of(tuple(sources))
    return RankSchedule(some, rows) if len(some.source) else None


def whole_schedule(document_lengths: np.ndarray) -> RankSchedule:
    """All of a pack on one rank."""
    return RankSchedule(whole_pack_schedule(document_lengths), 0)


def gathered_schedule(plan: ShardingPlan) -> RankSchedule:
    """All of a pack on one rank, in the order in which ulysses brings it there: rank by rank."""
    return RankSchedule(Layout("ulysses", plan, 0).gathered_schedule, 0)


@dataclass(frozen=True)
class KernelTimer:
    """Times the attention kernel of a device: bf16 or fp32 by the shape's dtype_bytes, medians of `repeats`."""

    device: torch.device
    repeats: int = 5
    clock: Clock | None = None
    kernel: AttentionKernel = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", select_attention("auto", self.device))

    @property
    def device_name(self) -> str:
        """As a row names it."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def times(self, one: RankSchedule, shape: AttentionShape) -> tuple[float, float]:
        """Median us of the forward and of the backward, each over all of the schedule's ranges at once.

        As ranks run them: gradients of received rows first, those of local ones in fp32, for others are added to them.
        """
        schedule, scale = one.schedule, shape.head_dim**-0.5
        q, local, received, grad = self._rows(int(schedule.query_stop.max()), one.received_rows, shape)
        attend = partial(self.kernel.attend, q, local, received, schedule, scale)
        out, lse = attend()
        inputs = (grad, q, local, received, out, lse, schedule, scale, torch.float32, _leave)
        gradients = partial(self.kernel.gradients, *inputs)
        clock = self.clock or own_clock(self.device, torch.get_num_threads())
        forward, backward = (median_us(work, self.repeats, self.device, clock) for work in (attend, gradients))
        return forward, backward

    def check(self, shape: AttentionShape) -> None:
        """Raise RuntimeError where the kernel differs from the reference: a wrong kernel is not timed."""
        one = whole_schedule(np.array(CHECKED))
        q, local, received, grad = self._rows(sum(CHECKED), 0, shape)
        out, lse = self.kernel.attend(q, local, received, one.schedule, shape.head_dim**-0.5)
        found = self.kernel.gradients(
            grad, q, local, received, out, lse, one.schedule, shape.head_dim**-0.5, torch.float32
        )
        leaves = queries, keys, values = [x.double().requires_grad_() for x in (q, *local)]
        expected = reference_attention(queries, keys, values, CHECKED)
        wanted = torch.autograd.grad(expected, leaves, grad.double())
        pairs = zip((out, found.q, *found.local), (expected.detach(), *wanted), strict=True)
        error = max(relative_error(value, reference) for value, reference in pairs)
        if not error <= LARGEST_ERRORS[shape.dtype_bytes]:
            raise RuntimeError(f"attention on {self.device_name} is off by {error:.1e}: a wrong kernel is not timed")

    def _rows(self, queries: int, received: int, shape: AttentionShape) -> tuple[Tensor, KV, KV, Tensor]:
        """Random q, local and received keys and values, and a gradient of the output."""
        random = torch.Generator(device=self.device).manual_seed(0)

        def draw(rows: int, heads: int) -> Tensor:
            made = torch.randn(rows, heads, shape.head_dim, generator=random, device=self.device)
            return made.to(DTYPES[shape.dtype_bytes])

        local, others = (KV(*(draw(rows, shape.kv_heads) for _ in range(2))) for rows in (queries, received))
        return draw(queries, shape.query_heads), local, others, draw(queries, shape.query_heads)


def _leave(gradients: Tensor) -> None:
    """Where a rank sends them home."""
