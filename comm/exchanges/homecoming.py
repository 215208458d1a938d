"""Gradients of received rows on their way to the rows' owners.

Shapes: T local rows, R rows of the receive buffer, K KV heads, D head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from flashcp.comm.rows import Inbox
from flashcp.comm.transport import Arrival, Transport
from flashcp.kernels.interface import KV

__all__ = ["Homecoming", "ReturnedRows"]


class Homecoming(ABC):
    """Gradients on their way to the owners of the rows."""

    @abstractmethod
    def wait(self) -> None:
        """Return when all have arrived."""

    @abstractmethod
    def add_to(self, gradients: KV) -> None:
        """Add what arrived to the local gradients, source by source in a fixed order."""


class ReturnedRows(Homecoming):
    """Gradients that come home in one slot per reader: rows start..stop of the inbox, [rows, 2, K, D], are for the
    local rows `index`."""

    def __init__(
        self, arrival: Arrival, inbox: Inbox, slots: Sequence[tuple[int, Tensor]], transport: Transport
    ) -> None:
        self._arrival, self._inbox, self._slots, self._transport = arrival, inbox, slots, transport

    def wait(self) -> None:
        """See Homecoming."""
        self._arrival.wait()
        self._arrival.leave()

    def add_to(self, gradients: KV) -> None:
        """See Homecoming. Slots in rank order; rows of one slot are distinct, so the sum is repeatable."""
        self.wait()
        for start, index in self._slots:
            slot = self._inbox.rows[start : start + len(index)]
            for total, part in zip(gradients, slot.unbind(1), strict=True):
                total.index_add_(0, index, part)
        self._transport.free(self._inbox.ticket)
