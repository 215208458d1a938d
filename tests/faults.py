"""Faults on purpose: messages that are mistreated where a transport sends them, and ranks that die, stop or raise.

    with faulty(Fault("corrupt", rank=1)):          # of the second rows that leave rank 1, one bit is another
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
from flashcp.comm.fabrics.base import Put
from flashcp.comm.levels import Level
from flashcp.comm.one_sided import OneSided
from flashcp.comm.transport import Inbox, OutgoingRows, Transfer, Transport
from flashcp.comm.two_sided import Operation, TwoSided

MESSAGE = ("corrupt", "misplace", "truncate", "drop", "duplicate", "delay", "reorder")
"""What can happen to a message. corrupt: a bit of it is another. misplace: its rows come in another order. truncate:
its second half stays away. drop: all of it. duplicate: it is sent twice. delay: it leaves late. reorder: what is sent
next leaves before it."""
SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "stop": signal.SIGSTOP}
RANK = (*SIGNALS, "raise")
"""What can happen to a rank."""
DELAY_S = 0.3
_NOBODYS_TAG = 1


class Mishap(RuntimeError):
    """A rank's own error, which no other rank knows."""


class Fault(NamedTuple):
    """What goes wrong, once. kind: of MESSAGE or RANK. rank: among all. inside: on the level inside a holder. what,
    nth: the transfer, among those of the name, from 0. begun: a rank's fault comes behind its messages, not before."""

    kind: str
    rank: int = 1
    inside: bool = False
    what: str = "rows"
    nth: int = 1
    begun: bool = False


def strike(kind: str) -> None:
    """What happens to a rank, here and now."""
    if kind == "raise":
        raise Mishap("on purpose")
    os.kill(os.getpid(), SIGNALS[kind])


@contextmanager
def faulty(fault: Fault | None) -> Iterator[None]:
    """Operators that are made meanwhile have the fault."""
    make = choice._transport

    def made(level: Level, *others: Any) -> tuple[Transport, str]:
        transport, why = make(level, *others)
        if fault is not None and dist.get_rank() == fault.rank and level.inside == fault.inside:
            (Puts if isinstance(transport, OneSided) else Sends)(transport, fault)  # type: ignore[arg-type]
        return transport, why

    with patch.object(choice, "_transport", made):
        yield


class _Mischief:
    def __init__(self, fault: Fault) -> None:
        self.fault, self._seen = fault, -1
        self.held: list[Callable[[], object]] = []

    def is_due(self, what: str) -> bool:
        """Counts a transfer; whether it is the one."""
        self._seen += what == self.fault.what
        return what == self.fault.what and self._seen == self.fault.nth

    def spoil(self, rows: Tensor) -> Tensor:
        """A message as its reader gets it."""
        kind = self.fault.kind
        if kind == "corrupt":
            rows = rows.clone()
            rows.view(-1).view(torch.uint8)[-2] ^= 1
        return {"misplace": rows.flip(0), "truncate": rows[: len(rows) // 2]}.get(kind, rows).contiguous()

    def release(self) -> None:
        """What was held back leaves."""
        held, self.held = self.held, []
        for leave in held:
            leave()

    @contextmanager
    def around(self) -> Iterator[None]:
        """What happens to the rank before and behind the operation."""
        if self.fault.kind == "delay":
            time.sleep(DELAY_S)
        if self.fault.kind in RANK and not self.fault.begun:
            strike(self.fault.kind)
        yield
        if self.fault.kind in RANK:
            strike(self.fault.kind)


class Puts(_Mischief):
    """Where a one-sided transport puts rows."""

    def __init__(self, transport: OneSided, fault: Fault) -> None:
        super().__init__(fault)
        self._rank, self._put = transport.rank, transport.fabric.put
        transport.fabric.put = self.put  # type: ignore[method-assign]

    def put(self, puts: Sequence[Put]) -> Callable[[], None]:
        theirs = [put for put in puts if put.to != self._rank and put.stop > put.start]
        if not theirs or not self.is_due(theirs[0].outgoing.what):
            left = self._put(puts)
            self.release()
            return left
        victim, rest, kind = theirs[0], [put for put in puts if put is not theirs[0]], self.fault.kind
        with self.around():
            if kind == "drop":
                return self._put(rest)
            if kind == "reorder":
                self.held.append(lambda: self._put([victim]))
                return self._put(rest)
            if kind == "duplicate":
                return self._put([*puts, victim])
            rows = self.spoil(victim.outgoing.packed()[victim.start : victim.stop])
            outgoing = OutgoingRows(rows, what=victim.outgoing.what)
            return self._put([victim._replace(outgoing=outgoing, start=0, stop=len(rows)), *rest])


class Sends(_Mischief):
    """Where a two-sided transport sends rows, or gives them to all ranks."""

    def __init__(self, transport: TwoSided, fault: Fault) -> None:
        super().__init__(fault)
        self._transport, self._batch, self._all_gather = transport, transport.batch, transport.all_gather
        self._unawaited: list[Operation] = []
        transport.batch, transport.all_gather = self.batch, self.all_gather  # type: ignore[method-assign]

    def batch(self, operations: Sequence[tuple[Any, Tensor, int]], what: str, tag: int) -> list[Operation]:
        sends = [one for one in operations if one[0] is dist.isend and one[1].numel()]
        if not sends or not self.is_due(what):
            works = self._batch(operations, what, tag)
            self.release()
            return works
        victim, rest, kind = sends[0], [one for one in operations if one is not sends[0]], self.fault.kind

        def again() -> None:
            self._unawaited += self._batch([victim], what, tag)

        with self.around():
            if kind == "drop":
                return self._batch(rest, what, tag)
            if kind == "reorder":
                self.held.append(again)
                return self._batch(rest, what, tag)
            works = self._batch([(victim[0], self.spoil(victim[1]), victim[2]), *rest], what, tag)
            if kind == "duplicate":
                again()
            return works

    def all_gather(self, block: OutgoingRows, inbox: Inbox) -> Transfer:
        if not self.is_due(block.what):
            return self._all_gather(block, inbox)
        with self.around():
            if self.fault.kind == "drop":  # nothing leaves, and nothing comes
                nothing = torch.empty(1, 1, dtype=torch.uint8)
                other = (self._transport.rank + 1) % self._transport.world_size
                works = self._batch([(dist.irecv, nothing, other)], block.what, _NOBODYS_TAG)
                return self._transport._start(works, [nothing], block.what)
            return self._all_gather(OutgoingRows(self.spoil(block.packed()), what=block.what), inbox)
