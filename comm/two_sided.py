"""Two-sided transport: torch.distributed's sends, receives and collectives (gloo; nccl, so far in a group of one rank).

Rows travel as bytes, so any dtype does. Over gloo the host waits for rows, over NCCL the stream that needs them.

Over gloo rows go by a send and a receive each, but where all ranks get the same: whoever stays away can be named. Those
of one transfer have a tag of their own, for gloo ends the process of a rank that is sent more bytes than it expects.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flashcp.comm.clock import span
from flashcp.comm.errors import ExchangeError
from flashcp.comm.transport import ALL, Departures, Inbox, OutgoingRows, Transfer, Transport, row_bytes
from flashcp.comm.waits import HostWaits, StreamWaits, bounded

ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
"""torch 2.13 has both, and warns of the older name."""
_FIRST_TAG, _TAGS = 8192, 1 << 16  # past those of mail; a transfer's returns after so many


class Operation(NamedTuple):
    """An operation that was begun. work: with a `wait()`, or None. source: whose rows it brings; ALL of an operation of
    all ranks, none where rows leave. awaited: what a rank waits for that waits for it."""

    work: Any
    source: int | None
    awaited: str


class TwoSided(Transport):
    """names: what errors call the ranks of the group; their numbers in it unless said otherwise."""

    sent_bytes = 0

    def __init__(self, group: dist.ProcessGroup | None, timeout_s: float, names: Sequence[int] | None = None) -> None:
        self.group = group
        self.name = str(dist.get_backend(group))
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.timeout_s = timeout_s
        self.waits: HostWaits = (HostWaits if self.name == "gloo" else StreamWaits)(
            names[self.rank] if names else self.rank, timeout_s
        )
        self._names: Sequence[int] = names or range(self.world_size)
        self._under_way: weakref.WeakSet[Transfer] = weakref.WeakSet()
        self._transfers = 0
        self._has_met = self.name == "gloo"

    def all_to_all(
        self, outgoing: OutgoingRows, sent: Sequence[int], inbox: Inbox, received: Sequence[int], offsets: Sequence[int]
    ) -> Transfer:
        self.waits.check()
        rows, what = outgoing.packed(), outgoing.what
        if self.name == "gloo" and rows.device.type == "cpu":
            leaving, arriving = (x.split(list(count)) for x, count in ((rows, sent), (inbox.rows, received)))
            arriving[self.rank].copy_(leaving[self.rank])
            others = [(self.rank + i) % self.world_size for i in range(1, self.world_size)]
            operations: list[tuple[Any, Tensor, int]] = [
                (dist.irecv, arriving[source], source) for source in reversed(others)
            ]
            operations += [(dist.isend, leaving[to], to) for to in others]  # no rank is everybody's first
            works = self.batch(operations, what, self.next_tag())
        else:
            work = dist.all_to_all_single(
                _bytes(inbox.rows), _bytes(rows), list(received), list(sent), group=self.group, async_op=True
            )
            works = [Operation(work, ALL, f"{what} of another rank")]
            self.sent_bytes += (sum(sent) - sent[self.rank]) * row_bytes(rows)
        return self._start(works, [rows, inbox.rows], what)

    def one_by_one(
        self, sent: Sequence[int], inbox: Inbox, received: Sequence[int], offsets: Sequence[int], what: str
    ) -> Departures:
        """Over gloo by sends and receives. Over NCCL those would be kernels one behind another, on streams of their
        pair: rows leave together there."""
        if self.name != "gloo":
            return super().one_by_one(sent, inbox, received, offsets, what)
        self.waits.check()
        return _OneByOne(self, inbox, received, what)

    def all_gather(self, block: OutgoingRows, inbox: Inbox) -> Transfer:
        self.waits.check()
        rows, works = block.packed(), list[Operation]()
        if rows.numel():  # else on no rank: blocks are equally large
            with bounded(self.timeout_s, self.waits.rank, f"{block.what} of another rank"):
                work = getattr(dist, ALL_GATHER)(_bytes(inbox.rows), _bytes(rows), group=self.group, async_op=True)
            works = [Operation(work, ALL, f"{block.what} of another rank")]
            self.sent_bytes += (self.world_size - 1) * rows.nbytes
        return self._start(works, [rows, inbox.rows], block.what)

    def shift(self, outgoing: OutgoingRows, inbox: Inbox, step: int, into: slice, offset: int) -> Transfer:
        """An empty tensor on either side is not sent: both neighbours know its size.

        Send and receive go as one batch: NCCL runs what is asked for one after the other in that order, and in a ring
        of ranks that all send first nobody would receive.
        """
        self.waits.check()
        rows, arriving = outgoing.packed(), inbox.rows[into]
        if not self._has_met:
            # A batch that some ranks have no part in must not be the first that NCCL hears of a group: it makes its
            # communicator then, with all of them (torch.distributed.batch_isend_irecv).
            self._has_met = True
            dist.all_reduce(torch.zeros(1, device=rows.device), group=self.group)
        after, before = ((self.rank + way) % self.world_size for way in (1, -1))
        operations = [(dist.isend, rows, after), (dist.irecv, arriving, before)]
        works = self.batch(operations, outgoing.what, self.next_tag())
        return self._start(works, [rows, arriving], outgoing.what)

    def next_tag(self) -> int:
        """Of a transfer's messages; all ranks come to their transfers in the same order."""
        self._transfers += 1
        return _FIRST_TAG + self._transfers % _TAGS

    def batch(self, operations: Iterable[tuple[Any, Tensor, int]], what: str, tag: int) -> list[Operation]:
        """Begin sends and receives (`dist.isend` or `dist.irecv`, rows, the other rank); none of empty tensors."""
        asked = [(operation, rows, other) for operation, rows, other in operations if rows.numel()]
        if not asked:
            return []
        with bounded(self.timeout_s, self.waits.rank, f"{what} to leave"):
            works = dist.batch_isend_irecv([
                dist.P2POp(operation, _bytes(rows), group=self.group, tag=tag, group_peer=other)
                for operation, rows, other in asked
            ])  # fmt: skip
        self.sent_bytes += sum(rows.nbytes for operation, rows, _ in asked if operation is dist.isend)
        if self.name != "gloo":  # the batch is one operation
            return [Operation(work, ALL, f"{what} of another rank") for work in works]
        return [
            Operation(work, other, f"{what} of rank {self._names[other]}")
            if operation is dist.irecv
            else Operation(work, None, f"its {what} to leave for rank {self._names[other]}")
            for work, (operation, _, other) in zip(works, asked, strict=True)
        ]

    def synchronize(self) -> None:
        for transfer in list(self._under_way):
            transfer.wait()
        self.waits.synchronize()

    def close(self) -> None:
        self.waits.close()

    def _start(self, works: list[Operation], tensors: list[Tensor], what: str) -> Transfer:
        """works: what was begun; the tensors live at least as long as it does. Both lists may grow until somebody waits
        for all."""
        waits, home = self.waits, self.waits.home(tensors[0].device)

        def land(source: int = ALL) -> None:
            landing = [begun for begun in works if ALL in (source, begun.source) or begun.source == source]
            works[:] = [begun for begun in works if begun not in landing]
            for awaited, begun in groupby((one for one in landing if one.work is not None), lambda one: one.awaited):
                with span(f"wait for {awaited}"):
                    waits.wait([one.work for one in begun], awaited, home)

        def land_unseen(memory: list[Tensor]) -> None:
            # Rows that nobody waits for (a handle thrown away) must still land: their memory goes with the transfer.
            try:
                land()
            except ExchangeError as error:
                waits.note(error)
            except Exception:  # a finalizer has nobody to tell
                return

        transfer = Transfer(sorted({begun.source for begun in works if begun.source is not None}), land, land)
        weakref.finalize(transfer, land_unseen, tensors).atexit = False  # holds them meanwhile
        self._under_way.add(transfer)
        return transfer


class _OneByOne(Departures):
    """Each rank's rows leave when they are ready, by a send of their own. What comes is received from the start."""

    def __init__(self, transport: TwoSided, inbox: Inbox, received: Sequence[int], what: str) -> None:
        arriving = inbox.rows.split(list(received))
        self._transport, self._tensors, self._what, self._tag = transport, [inbox.rows], what, transport.next_tag()
        receives = [(dist.irecv, rows, source) for source, rows in enumerate(arriving)]
        self._works = transport.batch(receives, what, self._tag)
        self._transfer = transport._start(self._works, self._tensors, what)

    def send(self, to: int, rows: Tensor) -> None:
        self._tensors.append(rows)
        self._works += self._transport.batch([(dist.isend, rows, to)], self._what, self._tag)

    def close(self) -> Transfer:
        return self._transfer


def _bytes(rows: Tensor) -> Tensor:
    """The same memory as bytes, [rows, bytes of a row]."""
    return rows.reshape(len(rows), math.prod(rows.shape[1:])).view(torch.uint8)
