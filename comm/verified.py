"""Rows that are verified: the checksum of each message travels beside it, and its reader compares.

A message is the rows of one rank for one reader in one transfer. Checksums go over the same transport, as transfers of
their own. They tell of rows that were changed, cut short, or put where others belong. A reader that finds such rows
goes on, so that all ranks come to the next header together, where they raise.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from flashcp.comm.transport import Departures, Inbox, OutgoingRows, Transfer, Transport
from flashcp.kernels.interface import WaitFlags

VERIFIABLE = ("shm", "gloo")
"""Transports over which the host waits for rows, so that it can look at them."""


class Verified(Transport):
    """Carries rows over another transport of `VERIFIABLE`. names: what errors call ranks. note: is told whose rows
    differ, when somebody waits for them.

    Beside every inbox lies one for checksums, int64 [ranks, 1]. `sent_bytes` and `receive_bytes` count checksums.
    """

    def __init__(self, inner: Transport, names: Sequence[int], note: Callable[[int], None]) -> None:
        self._inner, self._names, self._note = inner, names, note
        self.name, self.rank, self.world_size = inner.name, inner.rank, inner.world_size
        self.one_sided, self.throttle_gbps = inner.one_sided, inner.throttle_gbps
        self._beside: dict[int, int] = {}  # by the ticket of an inbox, that of its checksums

    @property
    def sent_bytes(self) -> int:
        return self._inner.sent_bytes

    @property
    def receive_bytes(self) -> int:
        return self._inner.receive_bytes

    @property
    def oldest(self) -> int:
        return self._inner.oldest

    def inbox(self, rows: int, most: int, row: Sequence[int], like: Tensor, steps: int = 1) -> Inbox:
        inbox, ranks = self._inner.inbox(rows, most, row, like, steps), self.world_size
        sums = self._inner.inbox(ranks, ranks, (1,), torch.empty(0, dtype=torch.int64), steps)
        self._beside = {of: ticket for of, ticket in self._beside.items() if self._inner.is_open(of)}
        self._beside[inbox.ticket] = sums.ticket
        return inbox._replace(beside=sums)

    def is_open(self, ticket: int) -> bool:
        return self._inner.is_open(ticket)

    def free(self, ticket: int) -> None:
        self._inner.free(ticket)
        self._inner.free(self._beside.pop(ticket, 0))

    def all_to_all(
        self, outgoing: OutgoingRows, sent: Sequence[int], inbox: Inbox, received: Sequence[int], offsets: Sequence[int]
    ) -> Transfer:
        outgoing = _packed(outgoing)
        moving = self._inner.all_to_all(outgoing, sent, inbox, received, offsets)
        told = self._tell([_checksum(rows) for rows in outgoing.packed().split(list(sent))], inbox)
        return self._compared(moving, told, inbox, dict(enumerate(range(len(sent)))), _places(received))

    def one_by_one(
        self, sent: Sequence[int], inbox: Inbox, received: Sequence[int], offsets: Sequence[int], what: str
    ) -> Departures:
        """Rows, and empty ones too, must be sent to every other rank."""
        own, ranks = self.rank, self.world_size
        sums = _beside(inbox)
        moving = self._inner.one_by_one(sent, inbox, received, offsets, what)
        told = self._inner.one_by_one(
            others := [int(rank != own) for rank in range(ranks)],
            sums._replace(rows=sums.rows[: ranks - 1]),
            others,
            [own - (own > reader) for reader in range(ranks)],
            "checksums",
        )
        lines = {source: source - (source > own) for source in range(ranks) if source != own}

        def close() -> Transfer:
            return self._compared(moving.close(), told.close(), inbox, lines, _places(received))

        return _OneByOne(moving, told, close)

    def all_gather(self, block: OutgoingRows, inbox: Inbox) -> Transfer:
        block, ranks = _packed(block), self.world_size
        moving = self._inner.all_gather(block, inbox)
        told = self._tell([_checksum(block.packed())] * ranks, inbox)
        return self._compared(moving, told, inbox, dict(enumerate(range(ranks))), _places([len(block)] * ranks))

    def shift(self, outgoing: OutgoingRows, inbox: Inbox, step: int, into: slice, offset: int) -> Transfer:
        outgoing, before = _packed(outgoing), (self.rank - 1) % self.world_size
        moving = self._inner.shift(outgoing, inbox, step, into, offset)
        sums = _lines([_checksum(outgoing.packed())] if len(outgoing) else [])
        line = slice(step, step + (into.stop > into.start))
        told = self._inner.shift(sums, _beside(inbox), step, line, step)
        return self._compared(moving, told, inbox, {before: step}, {before: into})

    def check(self, flags: WaitFlags) -> None:
        self._inner.check(flags)

    def synchronize(self) -> None:
        self._inner.synchronize()

    def close(self) -> None:
        self._inner.close()

    def _tell(self, sums: list[int], inbox: Inbox) -> Transfer:
        """Each reader its own."""
        one_each = [1] * self.world_size
        return self._inner.all_to_all(_lines(sums), one_each, _beside(inbox), one_each, [self.rank] * len(sums))

    def _compared(
        self, moving: Transfer, told: Transfer, inbox: Inbox, lines: Mapping[int, int], places: Mapping[int, slice]
    ) -> Transfer:
        """Rows and checksums as one transfer. lines, places: of each source's checksum and rows in the two inboxes."""
        sums = _beside(inbox).rows

        def await_rows(source: int) -> None:
            moving.wait(source)
            told.wait(source)
            if _checksum(inbox.rows[places[source]]) != int(sums[lines[source]]):
                self._note(self._names[source])

        def leave() -> None:
            moving.leave()
            told.leave()

        coming = [source for source in lines if places[source].stop > places[source].start]
        return Transfer(coming, await_rows, leave, moving.flags)


class _OneByOne(Departures):
    """A rank's checksum leaves behind its rows."""

    def __init__(self, rows: Departures, sums: Departures, close: Callable[[], Transfer]) -> None:
        self._of_rows, self._of_sums, self._close = rows, sums, close

    def send(self, to: int, rows: Tensor) -> None:
        self._of_rows.send(to, rows)
        self._of_sums.send(to, _lines([_checksum(rows)]).packed())

    def close(self) -> Transfer:
        return self._close()


def _packed(outgoing: OutgoingRows) -> OutgoingRows:
    """The same rows as they leave: what is checked is what travels."""
    return OutgoingRows(outgoing.packed(), what=outgoing.what)


def _places(received: Sequence[int]) -> dict[int, slice]:
    """Where each rank's rows arrive, one rank's behind another's."""
    return {source: slice(*ends) for source, ends in enumerate(pairwise(accumulate(received, initial=0)))}


def _beside(inbox: Inbox) -> Inbox:
    assert inbox.beside is not None
    return inbox.beside


def _lines(sums: list[int]) -> OutgoingRows:
    """int64 [sums, 1]."""
    return OutgoingRows(torch.tensor(sums, dtype=torch.int64).view(-1, 1), what="checksums")


def _checksum(rows: Tensor) -> int:
    """CRC-32 of the bytes."""
    return zlib.crc32(rows.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
