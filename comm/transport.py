"""What carries rows: the interface that every transport offers, and the transport of one rank alone.

Every wait is bounded. Nothing above `comm/` knows which transport runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from flashcp.comm.rows import Inbox, Leaving
from flashcp.kernels.interface import WaitFlags

__all__ = ["Alone", "Arrival", "Transport", "plain_inbox"]


class Arrival(Protocol):
    """Rows on their way, in and out. All waits raise ExchangeError if nothing comes within the time-out."""

    def wait(self, source: int | None = None) -> None:
        """Return when the rows of one rank have arrived, or all of them."""

    def leave(self) -> None:
        """Return when this rank's own rows have left: their tensors may be written to again."""

    def flags(self) -> WaitFlags | None:
        """What a kernel waits on, source by source; None where only the host can wait."""

    def check(self, flags: WaitFlags) -> None:
        """After a kernel that waited on flags: raises ExchangeTimeoutError when it waited in vain."""


class Transport(Protocol):
    """Moves rows between the ranks of one group.

    one_sided: rows are put where they are read and each source's arrival can be waited for, so that ranks need not
    come to an exchange together. sent_bytes: what has left this rank for others so far. oldest: of the inboxes that
    this rank still reads, for the header of its next call.
    """

    name: str
    rank: int
    world_size: int
    one_sided: bool

    @property
    def sent_bytes(self) -> int:
        """See the class."""

    @property
    def receive_bytes(self) -> int:
        """Memory of inboxes that stays allocated on this rank."""

    @property
    def oldest(self) -> int:
        """See the class."""

    def inbox(self, rows: int, most: int, row: Sequence[int], like: Tensor, steps: int = 1) -> Inbox:
        """Memory for `rows` rows of shape `row` in the dtype and on the device of `like`.

        most: the most rows that any rank asks for here; all ranks come to this in the same order. steps: how many
        exchanges fill it one after another (`ring`).
        """

    def is_open(self, ticket: int) -> bool:
        """Whether the inbox still holds its rows."""

    def free(self, ticket: int) -> None:
        """This rank has read the inbox for the last time; on all ranks at the same point of the program."""

    def all_to_all(
        self, leaving: Leaving, sent: Sequence[int], inbox: Inbox, received: Sequence[int], offsets: Sequence[int]
    ) -> Arrival:
        """Send the first sent[0] rows to rank 0, the next sent[1] to rank 1, ...; receive likewise.

        offsets: the row of each rank's inbox where this rank's rows begin.
        """

    def all_gather(self, block: Leaving, inbox: Inbox) -> Arrival:
        """Give every rank every block; blocks are equally large, the inbox holds them in rank order."""

    def shift(self, leaving: Leaving, inbox: Inbox, step: int, into: slice, offset: int) -> Arrival:
        """Send rows to rank + 1, row `offset` of its inbox, and receive those of rank - 1 in rows `into`."""

    def synchronize(self) -> None:
        """Wait for what is under way and raise what went wrong: an ExchangeError. The host waits, within the
        time-out."""


class Alone:
    """One rank that has nobody to talk to: what it sends it receives."""

    name = "none"
    rank = 0
    world_size = 1
    one_sided = False
    oldest = 0
    sent_bytes = 0
    receive_bytes = 0

    def inbox(self, rows: int, most: int, row: Sequence[int], like: Tensor, steps: int = 1) -> Inbox:
        """See Transport."""
        return plain_inbox(rows, row, like)

    def is_open(self, ticket: int) -> bool:
        """See Transport."""
        return True

    def free(self, ticket: int) -> None:
        """See Transport."""

    def all_to_all(
        self, leaving: Leaving, sent: Sequence[int], inbox: Inbox, received: Sequence[int], offsets: Sequence[int]
    ) -> Arrival:
        """See Transport."""
        return self.all_gather(leaving, inbox)

    def all_gather(self, block: Leaving, inbox: Inbox) -> Arrival:
        """See Transport."""
        block.write(inbox.rows, 0, len(block))
        return _Arrived()

    def shift(self, leaving: Leaving, inbox: Inbox, step: int, into: slice, offset: int) -> Arrival:
        """See Transport."""
        leaving.write(inbox.rows[into], 0, len(leaving))
        return _Arrived()

    def synchronize(self) -> None:
        """See Transport: nothing is ever under way."""


class _Arrived:
    def wait(self, source: int | None = None) -> None:
        pass

    def leave(self) -> None:
        pass

    def flags(self) -> WaitFlags | None:
        return None

    def check(self, flags: WaitFlags) -> None:
        pass


def plain_inbox(rows: int, row: Sequence[int], like: Tensor) -> Inbox:
    """An inbox in ordinary memory."""
    return Inbox(torch.empty((rows, *row), dtype=like.dtype, device=like.device))
