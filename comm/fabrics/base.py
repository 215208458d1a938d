"""What a fabric offers: symmetric regions, puts into other ranks' regions, and flags that tell of them.

A region lies at the same index on every rank and begins with two rows of int32 flags, one flag for each rank:
`arrived[s]` is written by rank s after its rows, `freed[r]` by rank r when it has read what rank s put there. Flags
hold epochs that only grow, and are compared with >=: it does not matter who comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flashcp.comm.rows import Leaving
from flashcp.kernels.interface import WaitFlags

__all__ = ["NO_PUT", "Fabric", "Put", "Region", "Ticking"]


NO_PUT = 2**62


@dataclass(frozen=True, eq=False)
class Region:
    """One collective allocation. index: the same on every rank. data_bytes: without the flags."""

    index: int
    data_bytes: int


@dataclass(frozen=True)
class Put:
    """Rows start..stop of `leaving` go to rank `to`, from byte `offset` of the region's data on.

    It waits until freed[to] >= after on this rank, and sets arrived[this rank] = epoch there when the rows have landed.
    """

    region: Region
    leaving: Leaving
    start: int
    stop: int
    to: int
    offset: int
    row: tuple[int, ...]
    dtype: torch.dtype
    after: int
    epoch: int


class Ticking(Protocol):
    """Puts under way."""

    def leave(self) -> None:
        """Return when their tensors have been read (on a GPU: when the current stream may write to them)."""


class Fabric(Protocol):
    """Memory of one kind and who writes to it."""

    name: str
    rank: int
    world_size: int

    @property
    def sent_bytes(self) -> int:
        """What has left this rank for others so far."""

    @property
    def oldest_put(self) -> int:
        """The least epoch of this rank's puts that have not landed yet; `NO_PUT` without any."""

    def allocate(self, index: int, data_bytes: int) -> Region:
        """A region on every rank; all ranks call this together. Raises HeapError on all where one has no room."""

    def retire(self, region: Region) -> None:
        """The region is about to go; all ranks call this together. Returns when no rank reads or writes it any more."""

    def tensor(self, region: Region, rows: int, row: Sequence[int], dtype: torch.dtype, token: object) -> Tensor:
        """The first rows of this rank's region; the token lives as long as a tensor shares their memory."""

    def put(self, puts: Sequence[Put]) -> Ticking:
        """Start some puts; they land in any order, each followed by its flag."""

    def wait(self, region: Region, source: int, epoch: int) -> None:
        """Return when arrived[source] >= epoch (on a GPU: when the current stream may read the rows).

        Raises ExchangeTimeoutError naming the source and the epoch.
        """

    def free(self, region: Region, epoch: int) -> None:
        """Set freed[this rank] = epoch on every rank, after all that was read before."""

    def flags(self, region: Region, epoch: int) -> WaitFlags | None:
        """What a kernel waits on."""

    def check(self, flags: WaitFlags) -> None:
        """After a kernel that waited on flags: raises ExchangeTimeoutError when it waited in vain."""

    def synchronize(self) -> None:
        """Return when this rank's puts have landed and all that was asked to wait has waited.

        The host waits. Raises an ExchangeError for whatever went wrong so far.
        """
