"""Attention of one rank of a plan, run and timed on the device at hand: its real schedule, on random rows; and so the
whole plan, rank by rank."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashcp.comm.exchanges.exchange import Layout
from flashcp.experiments.bench.harness import exact_results, median_us, relative_error
from flashcp.kernels.interface import KV
from flashcp.kernels.schedule import Schedule, whole_pack_schedule
from flashcp.kernels.selection import select_attention
from flashcp.sharding.plan import ShardingPlan
from flashcp.simulator.cost import AttentionShape
from flashcp.simulator.planned import Planned, Setting

DTYPES = {2: torch.bfloat16, 4: torch.float32}  # by a shape's dtype_bytes
LARGEST_ERRORS = {2: 1e-2, 4: 1e-4}  # of values and gradients, relative to float64
CHECKED = (1, 127, 129, 300)  # lengths of the pack that is compared


class RankSchedule(NamedTuple):
    """What one rank of a plan computes, and the rows of its receive buffer."""

    schedule: Schedule
    received_rows: int

    @property
    def query_rows(self) -> int:
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


class KernelTimer:
    """Times the attention kernel of a device: bf16 or fp32 by the shape's dtype_bytes, medians of `repeats`."""

    def __init__(self, device: torch.device, repeats: int = 5) -> None:
        self.device, self.repeats = device, repeats
        self.kernel = select_attention("auto", device)
        self.device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

    def times(self, one: RankSchedule, shape: AttentionShape) -> tuple[float, float]:
        """Median us of the forward and of the backward, each over all of the schedule's ranges at once.

        As ranks run them: gradients of received rows first, those of local ones in fp32, for others are added to them.
        """
        forward, backward = (median_us(work, self.repeats, self.device) for work in self._run(one, shape)[-1])
        return forward, backward

    def check(self, shape: AttentionShape) -> None:
        """Raise RuntimeError where the kernel differs from the reference: a wrong kernel is not timed."""
        inputs, grad, out, (_, gradients) = self._run(whole_schedule(np.array(CHECKED)), shape)
        found = gradients()
        pairs = zip((out, found.q, *found.local), exact_results(inputs, grad, CHECKED), strict=True)
        error = max(relative_error(value, reference) for value, reference in pairs)
        if not error <= LARGEST_ERRORS[shape.dtype_bytes]:
            raise RuntimeError(f"attention on {self.device_name} is off by {error:.1e}: a wrong kernel is not timed")

    def _run(self, one: RankSchedule, shape: AttentionShape) -> tuple[list[Tensor], Tensor, Tensor, tuple[Any, Any]]:
        """Random q, k, v and a gradient of the output, the output, and both passes, to be called again."""
        random = torch.Generator(device=self.device).manual_seed(0)

        def draw(rows: int, heads: int) -> Tensor:
            made = torch.randn(rows, heads, shape.head_dim, generator=random, device=self.device)
            return made.to(DTYPES[shape.dtype_bytes])

        schedule, scale, queries = one.schedule, shape.head_dim**-0.5, int(one.schedule.query_stop.max())
        k, v, *received = (draw(rows, shape.kv_heads) for rows in (queries, one.received_rows) for _ in range(2))
        q, grad = (draw(queries, shape.query_heads) for _ in range(2))
        inputs = q, KV(k, v), KV(*received), schedule, scale
        out, lse = self.kernel.attend(*inputs)
        attend = partial(self.kernel.attend, *inputs)
        # A rank sends the gradients of received rows home.
        rest: Any = out, lse, schedule, scale, torch.float32, lambda received, source=None: None
        gradients = partial(self.kernel.gradients, grad, *inputs[:3], *rest)
        return [q, k, v], grad, out, (attend, gradients)


class MeasuredPlanned(Planned):
    """A plan whose attention was run: every rank's kernels, one rank after another on the one device at hand.

    What a timeline takes as the time of a launch was measured: over everything a rank reads, over the rows of one
    source, over all received rows; both directions together, when the first of them is asked for. Shares of a launch,
    which no clock sees, are the cost model's, scaled to the launch.
    """

    def __init__(self, plan: ShardingPlan, setting: Setting, timer: KernelTimer) -> None:
        super().__init__(plan, setting)
        self._timer = timer

    @cached_property
    def _wholes(self) -> np.ndarray:
        """us [2, N]: forward and backward."""
        return self._times([None] * self.ranks)

    @cached_property
    def _steps(self) -> np.ndarray:
        """us [2, N, N], reader by owner."""
        return np.stack([self._times([[owner]] * self.ranks) for owner in range(self.ranks)], axis=2)

    @cached_property
    def _remotes(self) -> np.ndarray:
        """us [2, N]."""
        ranks = range(self.ranks)
        return self._times([[source for source in ranks if source != rank] for rank in ranks])

    def _whole_us(self, backward: bool) -> np.ndarray:
        return self._wholes[int(backward)]

    def _step_us(self, backward: bool) -> np.ndarray:
        return self._steps[int(backward)]

    def _remote_us(self, backward: bool) -> np.ndarray:
        return self._remotes[int(backward)]

    def _own_us(self, backward: bool) -> np.ndarray:
        return super()._own_us(backward) * self._scale(backward)

    def _read_us(self, backward: bool) -> np.ndarray:
        return super()._read_us(backward) * self._scale(backward)[:, None]

    def _scale(self, backward: bool) -> np.ndarray:
        """For each shard, its rank's measured launch over the modelled shares of it [S]."""
        shares = self.by_rank(super()._own_us(backward) + super()._read_us(backward).sum(axis=1))
        launch = np.maximum(0.0, self.whole_us(backward) - self.cost.launch_us(backward))
        return (launch / shares)[self.reads.rank]

    def _times(self, sources: Sequence[Collection[int] | None]) -> np.ndarray:
        """us [2, N]: every rank over the rows of its sources; None: over all that it reads."""
        schedules = [rank_schedule(self.plan, rank, some) for rank, some in enumerate(sources)]
        return np.array([self._timer.times(one, self.shape) if one else (0.0, 0.0) for one in schedules]).T
