"""Where the time of every rank goes: spans of work, with waiting as the gaps between them; blocks that go round."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Span(NamedTuple):
    """Something each rank does: kind (`attention`, `copies`, `exchange`), start and stop, float64 us [N]."""

    kind: str
    start: np.ndarray
    stop: np.ndarray


class Timeline:
    """Ranks that start together at 0. `now`: the time each has come to; all times are microseconds, [N]."""

    def __init__(self, world_size: int) -> None:
        self.now = np.zeros(world_size)
        self.spans: list[Span] = []
        self.busy = dict.fromkeys(("attention", "copies", "exchange"), self.now)  # time each rank has spent on a kind

    def run(self, kind: str, us: np.ndarray | float) -> None:
        start, self.now = self.now, self.now + us
        self.busy[kind] = self.busy[kind] + us
        self.spans.append(Span(kind, start, self.now))

    def wait(self, until: np.ndarray | float) -> None:
        """Every rank stands still until a time, if it has not passed."""
        self.now = np.maximum(self.now, until)

    def follow(self, other: Timeline) -> None:
        """All that another timeline has, begun at the one time that every rank here has come to."""
        self.spans += [Span(kind, self.now + start, self.now + stop) for kind, start, stop in other.spans]
        self.busy = {kind: spent + other.busy[kind] for kind, spent in self.busy.items()}
        self.now = self.now + other.now

    def meet(self) -> None:
        self.now = np.full_like(self.now, self.now.max())

    def beside(self, kind: str, start: np.ndarray | float, stop: np.ndarray) -> None:
        """Note what goes on beside a rank's work; nobody waits for it here."""
        self.spans.append(Span(kind, np.broadcast_to(start, stop.shape), stop))

    @property
    def busiest(self) -> int:
        """The rank with most work: attention and copies."""
        return int(np.argmax(self.busy["attention"] + self.busy["copies"]))


class Hops:
    """Blocks that ranks hand on, a port one at a time. hop: time of a block from each rank's predecessor, us [N]."""

    def __init__(self, hop: np.ndarray) -> None:
        self._hop, self._port = hop, np.zeros(len(hop))
        every = np.arange(len(hop))
        self._before, self._to_next = every - 1, hop[(every + 1) % len(hop)]  # indexing is far quicker than np.roll

    def send(self, ready: np.ndarray) -> np.ndarray:
        """Every rank hands on what it has ready at a time [N]. When its predecessor's has come [N]."""
        start = np.maximum(ready, self._port)
        self._port = start + self._to_next
        return start[self._before] + self._hop

    def around(self) -> float:
        """When all blocks have been everywhere, nothing beside them."""
        ready = np.zeros(len(self._hop))
        for _ in range(len(self._hop) - 1):
            ready = self.send(ready)
        return float(ready.max())
