"""What carries rows: the interface every transport offers, and the two-sided one over torch.distributed.

Rows travel as bytes, so any dtype does. Every wait is bounded. Nothing above `comm/` knows which transport runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from flashcp.comm.errors import ExchangeError, ExchangeTimeoutError

__all__ = ["Alone", "Arrival", "Transport", "TwoSided"]


class Arrival(Protocol):
    """Rows on their way."""

    def wait(self) -> None:
        """Return when the rows have arrived. Raises ExchangeError if they do not within the time-out."""


class Transport(Protocol):
    """Moves rows between the ranks of one group; tensors are contiguous [rows, ...], results arrive in `into`."""

    name: str
    rank: int
    world_size: int

    def all_to_all(self, rows: Tensor, sent: Sequence[int], into: Tensor, received: Sequence[int]) -> Arrival:
        """Send the first sent[0] rows to rank 0, the next sent[1] to rank 1, ...; receive likewise."""

    def all_gather(self, block: Tensor, into: Tensor) -> Arrival:
        """Give every rank every block; blocks are equally large, `into` holds them in rank order."""

    def shift(self, rows: Tensor, into: Tensor) -> Arrival:
        """Send rows to rank + 1 and receive from rank - 1, in a ring."""


class Alone:
    """One rank that has nobody to talk to: what it sends it receives."""

    name = "none"
    rank = 0
    world_size = 1

    def all_to_all(self, rows: Tensor, sent: Sequence[int], into: Tensor, received: Sequence[int]) -> Arrival:
        """See Transport."""
        into.copy_(rows)
        return _Arrived()

    def all_gather(self, block: Tensor, into: Tensor) -> Arrival:
        """See Transport."""
        into.copy_(block)
        return _Arrived()

    def shift(self, rows: Tensor, into: Tensor) -> Arrival:
        """See Transport."""
        into.copy_(rows)
        return _Arrived()


class _Arrived:
    def wait(self) -> None:
        pass


class TwoSided:
    """torch.distributed's sends, receives and collectives (gloo; nccl is written and was never run)."""

    def __init__(self, group: dist.ProcessGroup | None, timeout_s: float) -> None:
        self.group = group
        self.name = str(dist.get_backend(group))
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.timeout_s = timeout_s

    def all_to_all(self, rows: Tensor, sent: Sequence[int], into: Tensor, received: Sequence[int]) -> Arrival:
        """See Transport."""
        work = dist.all_to_all_single(
            _bytes(into), _bytes(rows), list(received), list(sent), group=self.group, async_op=True
        )
        return self._arrival([work], rows)

    def all_gather(self, block: Tensor, into: Tensor) -> Arrival:
        """See Transport."""
        if not block.numel():  # on no rank: blocks are equally large
            return _Arrived()
        blocks = list(_bytes(into).chunk(self.world_size))
        work = dist.all_gather(blocks, _bytes(block), group=self.group, async_op=True)
        return self._arrival([work], block)

    def shift(self, rows: Tensor, into: Tensor) -> Arrival:
        """See Transport. An empty tensor on either side is not sent: both neighbours know its size."""
        works = []
        if rows.numel():
            works.append(dist.isend(_bytes(rows), group=self.group, group_dst=(self.rank + 1) % self.world_size))
        if into.numel():
            works.append(dist.irecv(_bytes(into), group=self.group, group_src=(self.rank - 1) % self.world_size))
        return self._arrival(works, rows)

    def _arrival(self, works: list[dist.Work | None], rows: Tensor) -> Arrival:
        return _Arrival([work for work in works if work is not None], rows, self)


class _Arrival:
    def __init__(self, works: list[dist.Work], rows: Tensor, transport: TwoSided) -> None:
        self._works = works
        self._rows = rows  # kept alive until they have left
        self._transport = transport

    def wait(self) -> None:
        transport = self._transport
        works, self._works = self._works, []
        with bounded(transport.timeout_s, transport.rank, "rows of another rank") as limit:
            for work in works:
                work.wait(limit)

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
