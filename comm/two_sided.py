"""Two-sided transport: torch.distributed's sends, receives and collectives (gloo; nccl is written and was never run).

Rows travel as bytes, so any dtype does. Over gloo the host waits for rows, over NCCL the stream that needs them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashcp.comm.clock import span
from flashcp.comm.errors import ExchangeError
from flashcp.comm.rows import Inbox, Leaving
from flashcp.comm.transport import Arrival, plain_inbox
from flashcp.comm.waits import HostWaits, StreamWaits, Waits
from flashcp.kernels.interface import WaitFlags

__all__ = ["TwoSided"]


class TwoSided:
    """See the module."""

    one_sided = False
    oldest = 0
    receive_bytes = 0

    def __init__(self, group: dist.ProcessGroup | None, timeout_s: float) -> None:
        self.group = group
        self.name = str(dist.get_backend(group))
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.timeout_s = timeout_s
        self.sent_bytes = 0
        self.waits: Waits = (HostWaits if self.name == "gloo" else StreamWaits)(self.rank, timeout_s)
        self._under_way: weakref.WeakSet[_Arrival] = weakref.WeakSet()
        self._has_met = self.name == "gloo"

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
        self.waits.check()
        rows = leaving.packed()
        work = dist.all_to_all_single(
            _bytes(inbox.rows), _bytes(rows), list(received), list(sent), group=self.group, async_op=True
        )
        self.sent_bytes += (sum(sent) - sent[self.rank]) * _row_bytes(rows)
        return self._arrival([work], rows, inbox.rows, leaving.what)

    def all_gather(self, block: Leaving, inbox: Inbox) -> Arrival:
        """See Transport."""
        self.waits.check()
        rows = block.packed()
        if not rows.numel():  # on no rank: blocks are equally large
            return self._arrival([], rows, inbox.rows, block.what)
        work = dist.all_gather_into_tensor(_bytes(inbox.rows), _bytes(rows), group=self.group, async_op=True)
        self.sent_bytes += (self.world_size - 1) * rows.nbytes
        return self._arrival([work], rows, inbox.rows, block.what)

    def shift(self, leaving: Leaving, inbox: Inbox, step: int, into: slice, offset: int) -> Arrival:
        """See Transport. An empty tensor on either side is not sent: both neighbours know its size.

        Send and receive go as one batch: NCCL runs what is asked for one after the other in that order, and in a ring
        of ranks that all send first nobody would receive.
        """
        self.waits.check()
        batch = []
        rows, arriving = leaving.packed(), inbox.rows[into]
        self._meet(rows.device)
        if rows.numel():
            to = (self.rank + 1) % self.world_size
            batch.append(dist.P2POp(dist.isend, _bytes(rows), group=self.group, group_peer=to))
            self.sent_bytes += rows.nbytes
        if arriving.numel():
            source = (self.rank - 1) % self.world_size
            batch.append(dist.P2POp(dist.irecv, _bytes(arriving), group=self.group, group_peer=source))
        return self._arrival(dist.batch_isend_irecv(batch) if batch else [], rows, arriving, leaving.what)

    def synchronize(self) -> None:
        """See Transport."""
        for arrival in list(self._under_way):
            arrival.wait()
        self.waits.synchronize()

    def _meet(self, device: torch.device) -> None:
        """A batch that some ranks have no part in must not be the first that NCCL hears of a group: it makes its
        communicator then, with all of them (torch.distributed.batch_isend_irecv)."""
        if not self._has_met:
            self._has_met = True
            dist.all_reduce(torch.zeros(1, device=device), group=self.group)

    def _arrival(self, works: Sequence[Any], rows: Tensor, arriving: Tensor, what: str) -> Arrival:
        """works: with a `wait()`; the tensors live at least as long as they do."""
        arrival = _Arrival([work for work in works if work is not None], (rows, arriving), self.waits, what)
        self._under_way.add(arrival)
        return arrival


class _Arrival:
    def __init__(self, works: list[Any], tensors: tuple[Tensor, Tensor], waits: Waits, what: str) -> None:
        self._works, self._tensors, self._waits, self._what = works, tensors, waits, what
        self._home = waits.home(tensors[0].device)

    def wait(self, source: int | None = None) -> None:
        works, self._works = self._works, []
        if works:
            with span(f"wait for {self._what}"):
                self._waits.wait(works, self._what, self._home)

    def leave(self) -> None:
        self.wait()

    def flags(self) -> WaitFlags | None:
        return None

    def check(self, flags: WaitFlags) -> None:
        pass

    def __del__(self) -> None:
        # Rows that nobody waits for (a handle thrown away) must still land: their memory goes with this object.
        with suppress(Exception):
            try:
                self.wait()
            except ExchangeError as error:
                self._waits.note(error)


def _bytes(rows: Tensor) -> Tensor:
    """The same memory as bytes, [rows, bytes of a row]."""
    return rows.reshape(len(rows), math.prod(rows.shape[1:])).view(torch.uint8)


def _row_bytes(rows: Tensor) -> int:
    return math.prod(rows.shape[1:]) * rows.element_size()
