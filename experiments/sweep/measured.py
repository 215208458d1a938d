"""A plan whose attention was run: every rank's kernels, one rank after another on the one device at hand.

What a timeline takes as the time of a launch was measured: over everything a rank reads, over the rows of one source,
over all received rows. Shares of a launch, which no clock sees, are the cost model's, scaled to the launch.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from flashcp.experiments.bench.kernel_times import (
    KernelTimer,
    RankSchedule,
    gathered_schedule,
    rank_schedule,
    whole_schedule,
)
from flashcp.sharding.plan import ShardingPlan
from flashcp.simulator.planned import Planned, Setting

__all__ = ["MeasuredPlanned"]


class MeasuredPlanned(Planned):
    """See the module. Both directions are timed together, when the first of them is asked for."""

    def __init__(self, plan: ShardingPlan, setting: Setting, timer: KernelTimer) -> None:
        super().__init__(plan, setting)
        self._timer = timer
        self._wholes, self._steps, self._remotes = map(cache, (self._time_wholes, self._time_steps, self._time_remotes))
        self._heads = cache(self._time_heads)

    def _whole_us(self, backward: bool) -> np.ndarray:
        return self._wholes()[int(backward)]

    def _step_us(self, backward: bool) -> np.ndarray:
        return self._steps()[int(backward)]

    def _remote_us(self, backward: bool) -> np.ndarray:
        return self._remotes()[int(backward)]

    def _heads_us(self, backward: bool, in_order: bool) -> float:
        return self._heads(in_order)[int(backward)]

    def _own_us(self, backward: bool) -> np.ndarray:
        return super()._own_us(backward) * self._scale(backward)

    def _read_us(self, backward: bool) -> np.ndarray:
        return super()._read_us(backward) * self._scale(backward)[:, None]

    def _scale(self, backward: bool) -> np.ndarray:
        """For each shard, its rank's measured launch over the modelled shares of it [S]."""
        shares = self.by_rank(super()._own_us(backward) + super()._read_us(backward).sum(axis=1))
        launch = np.maximum(0.0, self.whole_us(backward) - self.cost.launch_us(backward))
        return (launch / shares)[self.reads.rank]

    def _time_wholes(self) -> np.ndarray:
        """us [2, N]: forward and backward."""
        return np.array([self._times(rank_schedule(self.plan, rank)) for rank in range(self.ranks)]).T

    def _time_steps(self) -> np.ndarray:
        """us [2, N, N], reader by owner."""
        every = range(self.ranks)
        one = [[rank_schedule(self.plan, rank, [source]) for source in every] for rank in every]
        return np.moveaxis(np.array([[self._times(step) for step in steps] for steps in one]), 2, 0)

    def _time_remotes(self) -> np.ndarray:
        """us [2, N]."""
        others = [[source for source in range(self.ranks) if source != rank] for rank in range(self.ranks)]
        return np.array([self._times(rank_schedule(self.plan, rank, some)) for rank, some in enumerate(others)]).T

    def _time_heads(self, in_order: bool) -> tuple[float, float]:
        one = whole_schedule(self.plan.document_lengths) if in_order else gathered_schedule(self.plan)
        return self._timer.times(one, self.heads_shape)

    def _times(self, one: RankSchedule | None) -> tuple[float, float]:
        return (0.0, 0.0) if one is None else self._timer.times(one, self.shape)
