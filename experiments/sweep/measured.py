"""A plan whose attention was run: every rank's kernels, one rank after another on the one device at hand.

What a timeline takes as the time of a launch was measured: over everything a rank reads, over the rows of one source,
over all received rows. Shares of a launch, which no clock sees, are the cost model's, scaled to the launch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property

import numpy as np

from flashcp.experiments.bench.kernel_times import KernelTimer, rank_schedule
from flashcp.sharding.plan import ShardingPlan
from flashcp.simulator.planned import Planned, Setting


class MeasuredPlanned(Planned):
    """See the module. Both directions are timed together, when the first of them is asked for."""

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
