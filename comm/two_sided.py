"""Two-sided transport: torch.distributed's sends, receives and collectives (gloo; nccl is written and was never run).

Rows travel as bytes, so any dtype does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from flashcp.comm.clock import span
from flashcp.comm.errors import ExchangeError, ExchangeTimeoutError
from flashcp.comm.rows import Inbox, Leaving
from flashcp.comm.transport import Arrival, plain_inbox
from flashcp.kernels.arrivals import Arrivals

__all__ = ["TwoSided", "bounded"]


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
        rows = leaving.packed()
        work = dist.all_to_all_single(
            _bytes(inbox.rows), _bytes(rows), list(received), list(sent), group=self.group, async_op=True
        )
        self.sent_bytes += (sum(sent) - sent[self.rank]) * _row_bytes(rows)
        return self._arrival([work], rows, leaving.what)

    def all_gather(self, block: Leaving, inbox: Inbox) -> Arrival:
        """See Transport."""
        rows = block.packed()
        if not rows.numel():  # on no rank: blocks are equally large
            return self._arrival([], rows, block.what)
        blocks = list(_bytes(inbox.rows).chunk(self.world_size))
        work = dist.all_gather(blocks, _bytes(rows), group=self.group, async_op=True)
        self.sent_bytes += (self.world_size - 1) * rows.nbytes
        return self._arrival([work], rows, block.what)

    def shift(self, leaving: Leaving, inbox: Inbox, step: int, into: slice, offset: int) -> Arrival:
        """See Transport. An empty tensor on either side is not sent: both neighbours know its size."""
        works = []
        rows, arriving = leaving.packed(), inbox.rows[into]
        if rows.numel():
            works.append(dist.isend(_bytes(rows), group=self.group, group_dst=(self.rank + 1) % self.world_size))
            self.sent_bytes += rows.nbytes
        if arriving.numel():
            works.append(dist.irecv(_bytes(arriving), group=self.group, group_src=(self.rank - 1) % self.world_size))
        return self._arrival(works, rows, leaving.what)

    def _arrival(self, works: list[dist.Work | None], rows: Tensor, what: str) -> Arrival:
        return _Arrival([work for work in works if work is not None], rows, self, what)


class _Arrival:
    def __init__(self, works: list[dist.Work], rows: Tensor, transport: TwoSided, what: str) -> None:
        self._works, self._what = works, what
        self._rows = rows  # kept alive until they have left
        self._transport = transport

    def wait(self, source: int | None = None) -> None:
        transport = self._transport
        works, self._works = self._works, []
        limited = bounded(transport.timeout_s, transport.rank, "rows of another rank")
        with span(f"wait for {self._what}"), limited as limit:
            for work in works:
                work.wait(limit)

    def leave(self) -> None:
        self.wait()

    def flags(self) -> Arrivals | None:
        return None

    def check(self, flags: Arrivals) -> None:
        pass

    def __del__(self) -> None:
        # Rows that nobody waits for (a handle thrown away) must still land: their memory goes with this object.
        with suppress(Exception):
            self.wait()


@contextmanager
def bounded(timeout_s: float, rank: int, what: str) -> Iterator[timedelta]:
    """For operations that must end: gives the time-out to wait with, and turns torch's errors into ours.

    Raises ExchangeTimeoutError past the time-out, ExchangeError when a peer is gone.
    """
    try:
        yield timedelta(seconds=max(timeout_s, 0.001))
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        if "timed out" in text.lower():
            raise ExchangeTimeoutError(f"rank {rank} waited {timeout_s:g} s for {what}") from error
        lost = "lost the connection" if "connection" in text.lower() or "pair" in text.lower() else "failed"
        raise ExchangeError(f"rank {rank} {lost} while waiting for {what}: {text}") from error


def _bytes(rows: Tensor) -> Tensor:
    """The same memory as bytes, [rows, bytes of a row]."""
    return rows.reshape(len(rows), math.prod(rows.shape[1:])).view(torch.uint8)


def _row_bytes(rows: Tensor) -> int:
    return math.prod(rows.shape[1:]) * rows.element_size()
