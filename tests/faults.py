"""Faults on purpose: a transport that mistreats what passes through it, and ranks that die, stop or raise.

    with faulty(Fault("corrupt", rank=1)):          # the second rows that leave rank 1 have one bit more
        cp = flashcp.ContextParallel(...)

Everything else in an operator is as it always is. Nothing here runs outside of tests.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from flashcp.comm import choice
from flashcp.comm.levels import Level
from flashcp.comm.transport import ALL, Departures, Inbox, OutgoingRows, Transfer, Transport
from flashcp.kernels.interface import WaitFlags

MESSAGE = ("corrupt", "misplace", "truncate", "drop", "duplicate", "delay", "reorder")
"""What can happen to a message. corrupt: a bit of it is another. misplace: its rows come in another order. truncate:
its second half stays away. drop: all of it. duplicate: it is sent twice. delay: it leaves late. reorder: the next
transfer leaves before it."""
RANK = ("kill", "stop", "raise")
"""What can happen to a rank."""
DELAY_S = 0.3


class Mishap(RuntimeError):
    """A rank's own error, which no other rank knows."""


class Fault(NamedTuple):
    """What goes wrong. kind: of MESSAGE or RANK. rank: among all. inside: on the level inside a holder. what: which
    transfers count, `nth`, from 0: the one that it happens to. begun: a rank's fault comes behind it, not before."""

    kind: str
    rank: int
    inside: bool = False
    what: str = "rows"
    nth: int = 1
    begun: bool = False


def strike(kind: str) -> None:
    """What happens to a rank, here and now."""
    if kind == "raise":
        raise Mishap("on purpose")
    os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)


@contextmanager
def faulty(fault: Fault | None) -> Iterator[None]:
    """Operators that are made meanwhile have the fault."""
    make = choice._transport

    def made(level: Level, *others: Any) -> tuple[Transport, str]:
        transport, why = make(level, *others)
        if fault is None or dist.get_rank() != fault.rank or level.inside != fault.inside:
            return transport, why
        return Faulty(transport, fault), why

    with patch.object(choice, "_transport", made):
        yield


class Faulty(Transport):
    """Carries rows over another transport. The fault happens once."""

    def __init__(self, inner: Transport, fault: Fault) -> None:
        self._inner, self._fault, self._seen = inner, fault, -1
        self._held: list[Callable[[], Transfer]] = []
        self.name, self.rank, self.world_size = inner.name, inner.rank, inner.world_size
        self.one_sided, self.throttle_gbps = inner.one_sided, inner.throttle_gbps

    sent_bytes = property(lambda self: self._inner.sent_bytes)  # type: ignore[assignment]
    receive_bytes = property(lambda self: self._inner.receive_bytes)  # type: ignore[assignment]
    oldest = property(lambda self: self._inner.oldest)  # type: ignore[assignment]

    def inbox(self, rows: int, most: int, row: Sequence[int], like: Tensor, steps: int = 1) -> Inbox:
        return self._inner.inbox(rows, most, row, like, steps)

    def is_open(self, ticket: int) -> bool:
        return self._inner.is_open(ticket)

    def free(self, ticket: int) -> None:
        self._inner.free(ticket)

    def check(self, flags: WaitFlags) -> None:
        self._inner.check(flags)

    def synchronize(self) -> None:
        self._inner.synchronize()

    def close(self) -> None:
        self._inner.close()

    def all_to_all(
        self, outgoing: OutgoingRows, sent: Sequence[int], inbox: Inbox, received: Sequence[int], offsets: Sequence[int]
    ) -> Transfer:
        def begin(parts: list[Tensor]) -> Transfer:
            rows, counts = OutgoingRows(torch.cat(parts), what=outgoing.what), [len(part) for part in parts]
            return self._inner.all_to_all(rows, counts, inbox, received, offsets)

        return self._pass(outgoing.what, list(outgoing.packed().split(list(sent))), begin)

    def one_by_one(
        self, sent: Sequence[int], inbox: Inbox, received: Sequence[int], offsets: Sequence[int], what: str
    ) -> Departures:
        departures = self._inner.one_by_one(sent, inbox, received, offsets, what)
        return FaultyDepartures(departures, self) if what == self._fault.what else departures

    def all_gather(self, block: OutgoingRows, inbox: Inbox) -> Transfer:
        rows, ranks = block.packed(), self.world_size
        if not self.one_sided:
            return self._pass(
                block.what, [rows], lambda parts: self._inner.all_gather(OutgoingRows(*parts, what=block.what), inbox)
            )
        each = [len(rows)] * ranks  # a put for each reader, as it is underneath
        copies = OutgoingRows(rows.repeat(ranks, *[1] * (rows.dim() - 1)), what=block.what)
        return self.all_to_all(copies, each, inbox, each, [len(rows) * self.rank] * ranks)

    def shift(self, outgoing: OutgoingRows, inbox: Inbox, step: int, into: slice, offset: int) -> Transfer:
        def begin(parts: list[Tensor]) -> Transfer:
            return self._inner.shift(OutgoingRows(*parts, what=outgoing.what), inbox, step, into, offset)

        return self._pass(outgoing.what, [outgoing.packed()], begin)

    def is_due(self, what: str) -> bool:
        """Counts a transfer; whether it is the one."""
        self._seen += what == self._fault.what
        return what == self._fault.what and self._seen == self._fault.nth

    def spoil(self, rows: Tensor) -> Tensor:
        """A message as its reader gets it."""
        kind = self._fault.kind
        if kind == "corrupt":
            rows = rows.clone()
            rows.view(-1).view(torch.uint8)[-2] ^= 1
        return {"misplace": rows.flip(0), "truncate": rows[: len(rows) // 2], "drop": rows[:0]}.get(kind, rows)

    def strike(self, begun: bool) -> None:
        """Where it is a rank's fault: now, if it is the time for it."""
        if self._fault.kind in RANK and begun == self._fault.begun:
            strike(self._fault.kind)

    def _pass(self, what: str, parts: list[Tensor], begin: Callable[[list[Tensor]], Transfer]) -> Transfer:
        """parts: the messages of a transfer, by reader; begin: lets them leave."""
        kind = self._fault.kind
        if not self.is_due(what):
            transfer = begin(parts)
            for late in self._held[:]:
                late()
            return transfer
        self.strike(begun=False)
        if kind == "delay":
            time.sleep(DELAY_S)
        if kind == "drop" and not self.one_sided and len(parts) == self.world_size:
            return Transfer()  # an operation of all ranks is done or not
        if kind == "reorder":
            return self._late(lambda: begin(parts))
        victim = next(i for i, part in enumerate(parts) if len(part) and (i != self.rank or len(parts) == 1))
        transfer = begin([self.spoil(part) if i == victim else part for i, part in enumerate(parts)])
        if kind == "duplicate":
            begin(parts)
        self.strike(begun=True)
        return transfer

    def _late(self, begin: Callable[[], Transfer]) -> Transfer:
        """A transfer that begins behind the next one, or when somebody waits for it."""
        begun: list[Transfer] = []

        def late() -> Transfer:
            if not begun:
                self._held.remove(late)
                begun.append(begin())
            return begun[0]

        self._held.append(late)
        return Transfer([ALL], lambda source: late().wait(), lambda: late().leave())


class FaultyDepartures(Departures):
    """Rows for one rank after another; it happens to the first ones of the transfer that are any."""

    def __init__(self, inner: Departures, transport: Faulty) -> None:
        self._inner, self._transport = inner, transport
        self._is_due, self._held = transport.is_due(transport._fault.what), list[tuple[int, Tensor]]()

    def send(self, to: int, rows: Tensor) -> None:
        kind = self._transport._fault.kind
        if not self._is_due or not len(rows):
            return self._inner.send(to, rows)
        self._is_due = False
        self._transport.strike(begun=False)
        if kind == "delay":
            time.sleep(DELAY_S)
        if kind == "reorder":
            return self._held.append((to, rows))
        self._inner.send(to, self._transport.spoil(rows))
        if kind == "duplicate":
            self._inner.send(to, rows)
        self._transport.strike(begun=True)

    def close(self) -> Transfer:
        for to, rows in self._held:
            self._inner.send(to, rows)
        return self._inner.close()
