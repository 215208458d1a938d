"""Two-sided transport: torch.distributed's sends, receives and collectives (gloo; nccl, so far in a group of one rank).

Rows travel as bytes, so any dtype does. Over gloo the host waits for rows, over NCCL the stream that needs them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashcp.comm.clock import span
from flashcp.comm.errors import ExchangeError
from flashcp.comm.transport import ALL, Departures, Inbox, OutgoingRows, Transfer, Transport, row_bytes
from flashcp.comm.waits import HostWaits, StreamWaits


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
        self._under_way: weakref.WeakSet[Transfer] = weakref.WeakSet()
        self._has_met = self.name == "gloo"

    def all_to_all(
        self, outgoing: OutgoingRows, sent: Sequence[int], inbox: Inbox, received: Sequence[int], offsets: Sequence[int]
    ) -> Transfer:
        self.waits.check()
        rows = outgoing.packed()
        work = dist.all_to_all_single(
            _bytes(inbox.rows), _bytes(rows), list(received), list(sent), group=self.group, async_op=True
        )
        self.sent_bytes += (sum(sent) - sent[self.rank]) * row_bytes(rows)
        return self._start([work], [rows, inbox.rows], outgoing.what)

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
        rows, works = block.packed(), []
        if rows.numel():  # else on no rank: blocks are equally large
            works = [dist.all_gather_into_tensor(_bytes(inbox.rows), _bytes(rows), group=self.group, async_op=True)]
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
        works = self.batch([(dist.isend, rows, after), (dist.irecv, arriving, before)])
        return self._start(works, [rows, arriving], outgoing.what)

    def batch(self, operations: Sequence[tuple[Any, Tensor, int]]) -> list[Any]:
        """Begin sends and receives (`dist.isend` or `dist.irecv`, rows, the other rank); none of empty tensors."""
        batch = [
            dist.P2POp(operation, _bytes(rows), group=self.group, group_peer=other)
            for operation, rows, other in operations
            if rows.numel()
        ]
        self.sent_bytes += sum(rows.nbytes for operation, rows, _ in operations if operation is dist.isend)
        return dist.batch_isend_irecv(batch) if batch else []

    def synchronize(self) -> None:
        for transfer in list(self._under_way):
            transfer.wait()
        self.waits.synchronize()

    def close(self) -> None:
        self.waits.close()

    def _start(self, works: list[Any], tensors: list[Tensor], what: str) -> Transfer:
        """works: what was begun, with a `wait()`; the tensors live at least as long as they do. Both lists may grow
        until somebody waits."""
        waits, home = self.waits, self.waits.home(tensors[0].device)

        def land(source: int = ALL) -> None:
            landing = [work for work in works if work is not None]
            works.clear()
            if landing:
                with span(f"wait for {what}"):
                    waits.wait(landing, what, home)

        def land_unseen(memory: list[Tensor]) -> None:
            # Rows that nobody waits for (a handle thrown away) must still land: their memory goes with the transfer.
            try:
                land()
            except ExchangeError as error:
                waits.note(error)
            except Exception:  # a finalizer has nobody to tell
                return

        transfer = Transfer([ALL], land, land)
        weakref.finalize(transfer, land_unseen, tensors).atexit = False  # holds them meanwhile
        self._under_way.add(transfer)
        return transfer


class _OneByOne(Departures):
    """Each rank's rows leave when they are ready, by a send of their own. What comes is received from the start."""

    def __init__(self, transport: TwoSided, inbox: Inbox, received: Sequence[int], what: str) -> None:
        arriving = inbox.rows.split(list(received))
        self._transport, self._tensors = transport, [inbox.rows]
        self._works = transport.batch([(dist.irecv, rows, source) for source, rows in enumerate(arriving)])
        self._transfer = transport._start(self._works, self._tensors, what)

    def send(self, to: int, rows: Tensor) -> None:
        self._tensors.append(rows)
        self._works += self._transport.batch([(dist.isend, rows, to)])

    def close(self) -> Transfer:
        return self._transfer


def _bytes(rows: Tensor) -> Tensor:
    """The same memory as bytes, [rows, bytes of a row]."""
    return rows.reshape(len(rows), math.prod(rows.shape[1:])).view(torch.uint8)
