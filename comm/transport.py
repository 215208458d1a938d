"""What carries rows: the interface that every transport offers, what it is given, and the transport of one rank alone.

Every wait is bounded. Nothing above `comm/` knows which transport runs.

Shapes: T local rows, K KV heads, D head_dim.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from flashcp.kernels.interface import KV, WaitFlags

ALL = -1
"""As a source: the rows of all ranks, which come together."""


@dataclass(frozen=True)
class OutgoingRows:
    """Rows on their way out of a rank. Nobody may write to their tensors before they have left.

    rows: a tensor [rows, ...], whose rows leave as they lie. Or K and V [T, K, D], of which the rows `index`, int64,
    leave side by side, [rows, 2, K, D]: K first, V behind. what: their name in a trace.
    """

    rows: Tensor | KV
    index: Tensor | None = None
    what: str = "rows"

    def __len__(self) -> int:
        return len(self.rows if self.index is None else self.index)

    def packed(self) -> Tensor:
        """All of them, contiguous [rows, ...]: for a transport that sends one message."""
        if isinstance(self.rows, Tensor):
            return self.rows.contiguous()
        assert self.index is not None
        if self.rows.k.is_cuda:
            from flashcp.kernels.pack import pack_rows

            return pack_rows(*self.rows, self.index)
        packed = self.rows.k.new_empty((len(self), 2, *self.rows.k.shape[1:]))
        self.write(packed, 0, len(self))
        return packed

    def write(self, into: Tensor, start: int, stop: int) -> None:
        """Rows start..stop into memory [stop - start, ...] that may be another rank's."""
        if isinstance(self.rows, Tensor):
            into.copy_(self.rows[start:stop], non_blocking=True)
            return
        assert self.index is not None
        chosen = self.index[start:stop]
        for i, part in enumerate(self.rows):
            into[:, i].copy_(part.index_select(0, chosen), non_blocking=True)


def row_bytes(rows: Tensor) -> int:
    """Of one row of a tensor [rows, ...]."""
    return math.prod(rows.shape[1:]) * rows.element_size()


class Inbox(NamedTuple):
    """Memory for others' rows, [rows, ...]. ticket: what the transport knows it by; 0 for memory of its own. beside:
    where what is told of the rows arrives (`verified.py`)."""

    rows: Tensor
    ticket: int = 0
    beside: Inbox | None = None


class Transfer:
    """Rows on their way, out of this rank and into an inbox. All waits raise ExchangeError past the time-out.

    sources: ranks whose rows come, or ALL. await_rows: returns when the rows of one of them have arrived.
    leave: returns when this rank's own rows have left, so that their tensors may be written to again.
    flags: what a kernel waits on, source by source, where it can. Without arguments all has arrived.
    """

    def __init__(
        self,
        sources: Sequence[int] = (),
        await_rows: Callable[[int], object] | None = None,
        leave: Callable[[], None] = lambda: None,
        flags: Callable[[], WaitFlags | None] = lambda: None,
    ) -> None:
        self._awaited, self._await_rows, self.leave, self._flags = list(sources), await_rows, leave, flags

    def wait(self, source: int | None = None) -> None:
        """Return when the rows of one rank have arrived, or all of them."""
        for each in list(self._awaited):
            if source in (None, each) or each == ALL:
                assert self._await_rows is not None
                self._await_rows(each)
                self._awaited.remove(each)

    def finish(self) -> None:
        """Return when all rows have arrived and this rank's own have left."""
        self.wait()
        self.leave()

    def flags(self) -> WaitFlags | None:
        """What a kernel waits on, source by source; None where only the host can wait, and where nobody is awaited:
        nothing holds the region of an inbox without rows."""
        return self._flags() if self._awaited else None


class Departures:
    """Rows that leave this rank for one other after another, in any order. Here they wait for the last and leave
    together: an operation of all ranks has no parts.

    leave: sends rows [rows, ...], those for rank 0 first. like: rows of their kind.
    """

    def __init__(self, leave: Callable[[Tensor], Transfer], like: Tensor) -> None:
        self._leave, self._rows = leave, {-1: like[:0]}

    def send(self, to: int, rows: Tensor) -> None:
        """At most once for each rank. Nobody may write to the rows before they have left."""
        self._rows[to] = rows

    def close(self) -> Transfer:
        """The way of all that was sent, and of what comes."""
        return self._leave(side_by_side([self._rows[to] for to in sorted(self._rows)]))


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Rows [rows, ...] one behind another; not copied where they lie so. Parts are contiguous."""
    filled = [part for part in parts if part.numel()]
    if filled and all(
        a.data_ptr() + a.nbytes == b.data_ptr() and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        for a, b in pairwise(filled)
    ):
        return filled[0].as_strided((sum(map(len, filled)), *filled[0].shape[1:]), filled[0].stride())
    return torch.cat(list(parts))


class Transport(ABC):
    """Moves rows between the ranks of one group.

    one_sided: rows are put where they are read and each source's arrival can be waited for, so that ranks need not
    come to an exchange together. throttle_gbps: GB/s at which this rank's rows leave; 0: at once, also where
    `TransportOptions` ask for less and nobody here slows rows.
    """

    name: str
    rank: int
    world_size: int
    one_sided = False
    throttle_gbps = 0.0

    @property
    def sent_bytes(self) -> int:
        """What has left this rank for others so far."""
        return 0

    @property
    def receive_bytes(self) -> int:
        """Memory of inboxes that stays allocated on this rank."""
        return 0

    @property
    def oldest(self) -> int:
        """The oldest of the inboxes that this rank still reads, for the header of its next call."""
        return 0

    def inbox(self, rows: int, most: int, row: Sequence[int], like: Tensor, steps: int = 1) -> Inbox:
        """Memory for `rows` rows of shape `row` in the dtype and on the device of `like`.

        most: the most rows that any rank asks for here; all ranks come to this in the same order. steps: how many
        exchanges fill it one after another (`ring`).
        """
        return Inbox(like.new_empty((rows, *row)))

    def is_open(self, ticket: int) -> bool:
        """Whether the inbox still holds its rows."""
        return True

    def free(self, ticket: int) -> None:
        """This rank has read the inbox for the last time; on all ranks at the same point of the program."""
        return

    @abstractmethod
    def all_to_all(
        self, outgoing: OutgoingRows, sent: Sequence[int], inbox: Inbox, received: Sequence[int], offsets: Sequence[int]
    ) -> Transfer:
        """Send the first sent[0] rows to rank 0, the next sent[1] to rank 1, ...; receive likewise.

        offsets: the row of each rank's inbox where this rank's rows begin.
        """

    def one_by_one(
        self, sent: Sequence[int], inbox: Inbox, received: Sequence[int], offsets: Sequence[int], what: str
    ) -> Departures:
        """The same for rows that become ready for one rank after another; `sent` without this rank's own.

        All ranks come to this in the same order. what: the rows' name in a trace.
        """

        def leave(rows: Tensor) -> Transfer:
            return self.all_to_all(OutgoingRows(rows, what=what), sent, inbox, received, offsets)

        return Departures(leave, inbox.rows)

    @abstractmethod
    def all_gather(self, block: OutgoingRows, inbox: Inbox) -> Transfer:
        """Give every rank every block; blocks are equally large, the inbox holds them in rank order."""

    @abstractmethod
    def shift(self, outgoing: OutgoingRows, inbox: Inbox, step: int, into: slice, offset: int) -> Transfer:
        """Send rows to rank + 1, row `offset` of its inbox, and receive those of rank - 1 in rows `into`."""

    def check(self, flags: WaitFlags) -> None:
        """After a kernel that waited on flags: raises ExchangeTimeoutError when it waited in vain."""
        return

    def synchronize(self) -> None:
        """Wait for what is under way and raise what went wrong: an ExchangeError. The host waits, within the
        time-out."""
        return

    def close(self) -> None:
        """End this rank's threads; nobody is waited for. Nothing travels afterwards."""
        return


class Alone(Transport):
    """One rank that has nobody to talk to: what it sends it receives."""

    name = "none"
    rank = 0
    world_size = 1

    def all_to_all(
        self, outgoing: OutgoingRows, sent: Sequence[int], inbox: Inbox, received: Sequence[int], offsets: Sequence[int]
    ) -> Transfer:
        return self.all_gather(outgoing, inbox)

    def all_gather(self, block: OutgoingRows, inbox: Inbox) -> Transfer:
        block.write(inbox.rows, 0, len(block))
        return Transfer()

    def shift(self, outgoing: OutgoingRows, inbox: Inbox, step: int, into: slice, offset: int) -> Transfer:
        outgoing.write(inbox.rows[into], 0, len(outgoing))
        return Transfer()
