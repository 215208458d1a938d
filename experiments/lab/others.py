"""How much of the machine went to others while a lab measured."""

from __future__ import annotations

import os
import time
from pathlib import Path

from flashcp.train.ranks import Ranks

TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Others:
    """Watches from its making on. Every rank makes one, and all ask together.

    Interrupts are nobody's: the lab's own sockets make most of them.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._begun = self._now()

    def taken(self, cores: float) -> float:
        """Cores that others kept busy on average, beyond those that the machine has besides the ranks' `cores`."""
        machine, rank, wall = (late - early for early, late in zip(self._begun, self._now(), strict=True))
        (lab,) = self._ranks.sum(rank)
        return max(0.0, (machine - lab) / wall - ((os.cpu_count() or 1) - cores))

    def _now(self) -> tuple[float, float, float]:
        """CPU seconds of the machine and of this rank, and the time."""
        user, nice, system, _, _, _, _, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        return TICK_S * (user + nice + system + steal), time.process_time(), time.monotonic()
