"""Blocks that go round: rank after rank hands on what it has; a port carries one at a time."""

from __future__ import annotations

import numpy as np

__all__ = ["Hops"]


class Hops:
    """hop: time of a block from each rank's predecessor, us [N]."""

    def __init__(self, hop: np.ndarray) -> None:
        self._hop, self._port = hop, np.zeros(len(hop))

    def send(self, ready: np.ndarray) -> np.ndarray:
        """Every rank hands on what it has ready at a time [N]. When its predecessor's has come [N]."""
        start = np.maximum(ready, self._port)
        self._port = start + np.roll(self._hop, -1)
        return np.roll(start, 1) + self._hop

    def around(self) -> float:
        """When all blocks have been everywhere, nothing beside them."""
        ready = np.zeros(len(self._hop))
        for _ in range(len(self._hop) - 1):
            ready = self.send(ready)
        return float(ready.max())
