"""What a plan is to one rank's exchange, and KV on its way under it.

Shapes: R rows of the receive buffer, K KV heads, D head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from flashcp.comm.rows import Inbox
from flashcp.comm.transport import Arrival
from flashcp.kernels.schedule import Schedule, build_schedule
from flashcp.kernels.uploads import Uploaded
from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.shards import Segments

__all__ = ["Flight", "Layout", "OneArrival"]


class Layout:
    """One plan as a rank's exchange sees it: what leaves, what arrives where, what is computed from it."""

    def __init__(self, exchange: str, plan: ShardingPlan, rank: int) -> None:
        self.exchange, self.plan, self.rank = exchange, plan, rank
        self.local: Segments = plan.local(rank)
        self.received: Segments = EXCHANGES[exchange].received(plan, rank)
        self.sent: Segments = EXCHANGES[exchange].sent(plan, rank)
        self.schedule_of = lru_cache(maxsize=None)(self._schedule_of)
        self._sent_index = lru_cache(maxsize=None)(lambda device: Uploaded(self.sent.buffer_rows(), device))

    def sent_index(self, device: torch.device) -> Tensor:
        """Local rows in the order they leave."""
        return self._sent_index(device).here()

    @cached_property
    def schedule(self) -> Schedule:
        """All that this rank computes."""
        return build_schedule(self.local, local=self.local, received=self.received)

    @cached_property
    def local_schedule(self) -> Schedule:
        """What the local rows alone contribute."""
        return build_schedule(self.local, local=self.local)

    @cached_property
    def gathered_schedule(self) -> Schedule:
        """The whole pack computed from the receive buffer, queries too."""
        return build_schedule(self.received, local=self.received)

    def stages(self, parts: int) -> list[tuple[int, ...]]:
        """Sources in about equal parts, in the order in which their rows come: rank - 1 first, rank + 1 last."""
        sources = set(self.received.rank.tolist()) - {self.rank}
        ranks = self.plan.world_size
        order = [source for i in range(1, ranks) if (source := (self.rank - i) % ranks) in sources]
        cuts = [len(order) * i // parts for i in range(parts + 1)]
        return [tuple(order[a:b]) for a, b in pairwise(cuts) if b > a]

    def _schedule_of(self, sources: tuple[int, ...]) -> Schedule:
        """What the rows received from some ranks contribute."""
        return build_schedule(self.local, received=self.received.take(np.isin(self.received.rank, sources)))


class Flight(ABC):
    """KV on its way to this rank, into an inbox [R, 2 (K and V), K, D], and this rank's own to others.

    arrival: the one operation in which the rows of all sources come, where there is one.
    """

    inbox: Inbox
    arrival: Arrival | None = None

    @abstractmethod
    def arrivals(self, stages: int) -> Iterator[Schedule]:
        """As rows arrive, the schedules that can now run; together they cover the whole receive buffer.

        stages: how many there are, where the exchange leaves the choice.
        """

    @abstractmethod
    def leave(self) -> None:
        """Return when this rank's rows have left: k and v may be written to again."""

    def wait(self) -> None:
        """Return when all rows have arrived."""
        for _ in self.arrivals(1):
            pass


class OneArrival(Flight):
    """Rows of all ranks that leave and arrive in one operation."""

    arrival: Arrival

    def __init__(self, arrival: Arrival, inbox: Inbox, layout: Layout) -> None:
        self.inbox = inbox
        self.arrival, self._layout = arrival, layout

    def arrivals(self, stages: int) -> Iterator[Schedule]:
        """See Flight."""
        for sources in self._layout.stages(stages):
            for source in sources:
                self.arrival.wait(source)
            yield self._layout.schedule_of(sources)

    def wait(self) -> None:
        """See Flight."""
        self.arrival.wait()

    def leave(self) -> None:
        """See Flight."""
        self.arrival.leave()
