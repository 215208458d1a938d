"""From one plan's ranks to another's: which rows of the pack change their rank, as arithmetic."""

from __future__ import annotations

import numpy as np

from flashcp.sharding.assignment import Assignment
from flashcp.sharding.documents import expand_ranges, sum_by


def check_same_pack(before: Assignment, after: Assignment) -> None:
    """Raises ValueError for plans of other numbers of ranks or tokens."""
    sizes = [(plan.world_size, int(plan.offsets[-1])) for plan in (before, after)]
    for (one, other), what in zip(zip(*sizes, strict=True), ("ranks", "tokens"), strict=True):
        if one != other:
            raise ValueError(f"plans for {one} and {other} {what}: expected two plans of one pack")


class Move:
    """Rows of one pack from the ranks of plan `before` to those of plan `after`.

    The plans may see other documents in the pack: only their ranks and tokens must be equally many (ValueError).
    pieces: first and last + 1 row of the pack, and both ranks, of the pieces that both plans leave whole.
    """

    def __init__(self, before: Assignment, after: Assignment) -> None:
        check_same_pack(before, after)
        firsts = [plan.offsets[plan.table.document] + plan.table.start for plan in (before, after)]
        self.start = np.union1d(*firsts)
        self.stop = np.append(self.start[1:], before.offsets[-1])
        self.source, self.target = (
            plan.table.rank[np.searchsorted(first, self.start, side="right") - 1]
            for plan, first in zip((before, after), firsts, strict=True)
        )
        self.world_size = before.world_size

    @property
    def rows(self) -> np.ndarray:
        """Rows that go from each rank (first axis) to each other (second axis); those that stay are counted, int64
        [world_size, world_size]."""
        pair = self.source * self.world_size + self.target
        return sum_by(pair, self.stop - self.start, self.world_size**2).reshape(self.world_size, self.world_size)

    def leaving(self, rank: int) -> np.ndarray:
        """Local rows of a rank before, in the order in which they leave: those for rank 0 first, int64."""
        return self._order(self.source == rank, self.target)

    def arriving(self, rank: int) -> np.ndarray:
        """Local rows of a rank afterwards, in the order in which they come: those of rank 0 first, int64."""
        return self._order(self.target == rank, self.source)

    def _order(self, mine: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Local order is pack order; of the pieces of one rank those with the same other end travel together."""
        rows = (self.stop - self.start)[mine]
        local = np.cumsum(rows) - rows
        by_other = np.argsort(other[mine], kind="stable")
        return expand_ranges(local[by_other], rows[by_other])
