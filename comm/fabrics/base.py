"""What a fabric offers: symmetric regions, puts into other ranks' regions, and flags that tell of them.

A region lies at the same index on every rank and begins with two rows of int32 flags, one flag for each rank:
`arrived[s]` is written by rank s after its rows, `freed[r]` by rank r when it has read what rank s put there. Flags
hold epochs that only grow, and are compared with >=: it does not matter who comes first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from flashcp.comm.errors import ExchangeTimeoutError
from flashcp.comm.transport import OutgoingRows
from flashcp.kernels.interface import WaitFlags

NO_PUT = 2**62
ARRIVED, FREED = 0, 1  # rows of flags
_PAGE = 4096


def head_bytes(ranks: int) -> int:
    """Of a region's flags: whole pages, so that the data begins at one."""
    return -(-8 * ranks // _PAGE) * _PAGE


@dataclass(frozen=True, eq=False)
class Region:
    """One collective allocation: a head of flags, and data.

    index: the same on every rank. data_bytes: without the flags. memories: bytes of every rank, uint8, as this process
    addresses them. owner: whatever must live for them to stay mapped; the tensors themselves may own nothing.
    """

    index: int
    data_bytes: int
    memories: Sequence[Tensor]
    owner: object = None

    @cached_property
    def flags(self) -> list[Tensor]:
        """Of every rank, int32 [2, N]: arrived, freed."""
        ranks = len(self.memories)
        return [memory[: 8 * ranks].view(torch.int32).view(2, ranks) for memory in self.memories]

    def flag(self, rank: int, row: int, of: int) -> Tensor:
        """One flag in a rank's memory, int32 [1]."""
        return self.flags[rank][row, of : of + 1]

    def data(self, rank: int, offset: int, size: int) -> Tensor:
        """Bytes of a rank's receive buffer."""
        start = head_bytes(len(self.memories)) + offset
        return self.memories[rank][start : start + size]


class Put(NamedTuple):
    """Rows start..stop of `outgoing` go to rank `to`, from byte `offset` of the region's data on.

    It waits until freed[to] >= after on this rank, and sets arrived[this rank] = epoch there when the rows have landed.
    """

    region: Region
    outgoing: OutgoingRows
    start: int
    stop: int
    to: int
    offset: int
    row: tuple[int, ...]
    dtype: torch.dtype
    after: int
    epoch: int


class Fabric(ABC):
    """Memory of one kind and who writes to it.

    sent_bytes: what has left this rank for others so far. throttle_gbps: GB/s at which it leaves; 0: at once. names:
    what errors call ranks; their numbers here unless said otherwise.
    """

    def __init__(self, name: str, rank: int, world_size: int, timeout_s: float, throttle_gbps: float) -> None:
        self.name, self.rank, self.world_size = name, rank, world_size
        self.names: Sequence[int] = range(world_size)
        self.timeout_s, self.throttle_gbps, self.sent_bytes = timeout_s, throttle_gbps, 0

    def timed_out(self, what: str) -> ExchangeTimeoutError:
        """This rank waited in vain."""
        return ExchangeTimeoutError(f"rank {self.names[self.rank]} waited {self.timeout_s:g} s for {what}")

    @property
    @abstractmethod
    def oldest_put(self) -> int:
        """The least epoch of this rank's puts that have not landed yet; `NO_PUT` without any."""

    @abstractmethod
    def allocate(self, index: int, data_bytes: int) -> Region:
        """A region on every rank; all ranks call this together. Raises HeapError on all where one has no room."""

    @abstractmethod
    def retire(self, region: Region) -> None:
        """The region is about to go; all ranks call this together. Returns when no rank reads or writes it any more."""

    @abstractmethod
    def tensor(self, region: Region, rows: int, row: Sequence[int], dtype: torch.dtype, token: object) -> Tensor:
        """The first rows of this rank's region; the token lives as long as a tensor shares their memory."""

    @abstractmethod
    def put(self, puts: Sequence[Put]) -> Callable[[], None]:
        """Start some puts; they land in any order, each followed by its flag.

        What is returned, called, returns when their tensors have been read (on a GPU: when the current stream may write
        to them).
        """

    @abstractmethod
    def wait(self, region: Region, source: int, epoch: int) -> None:
        """Return when arrived[source] >= epoch (on a GPU: when the current stream may read the rows).

        Raises ExchangeTimeoutError naming the source and the epoch.
        """

    @abstractmethod
    def free(self, region: Region, epoch: int) -> None:
        """Set freed[this rank] = epoch on every rank, after all that was read before."""

    @abstractmethod
    def flags(self, region: Region, epoch: int) -> WaitFlags:
        """What a kernel waits on."""

    @abstractmethod
    def check(self, flags: WaitFlags) -> None:
        """After a kernel that waited on flags: raises ExchangeTimeoutError when it waited in vain."""

    @abstractmethod
    def synchronize(self) -> None:
        """Return when this rank's puts have landed and all that was asked to wait has waited.

        The host waits. Raises an ExchangeError for whatever went wrong so far.
        """

    def close(self) -> None:
        """End this rank's thread, where one puts rows; what has not left stays."""
        return
