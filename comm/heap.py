"""A symmetric heap: regions at the same index on every rank, leased to one exchange after another.

All ranks take and free leases at the same points of the program, so they choose the same region without a word, and
allocate together when none is free. A lease that nobody frees (its graph was thrown away, or recomputed by activation
checkpointing) ends with its memory; ranks notice that at different times, so its region is taken again only when the
headers of all ranks say that they read nothing so old.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

from flashcp.comm.errors import HeapError
from flashcp.comm.fabrics.base import Fabric, Region

MIB = 1 << 20


class LeaseToken:
    """Lives as long as the memory of a lease: its end is noticed."""


class Lease(NamedTuple):
    """A region for one exchange. Its steps bring rows under epochs first, ..., last; after: the epoch of the lease
    before, which its readers must have freed before rows are put."""

    region: Region
    first: int
    last: int
    after: int


class SymmetricHeap:
    """See the module. oldest(): the oldest epoch that any rank still reads, as all ranks know it; settle(): compare
    headers. limit_bytes: of all regions on a rank, 0 for no limit. start_bytes: the least that a region holds."""

    def __init__(
        self,
        fabric: Fabric,
        oldest: Callable[[], int],
        settle: Callable[[], None],
        start_bytes: int = 0,
        limit_bytes: int = 0,
    ) -> None:
        self.fabric, self._oldest, self._settle = fabric, oldest, settle
        self.start_bytes, self.limit_bytes = start_bytes, limit_bytes
        self._last: dict[int, Lease] = {}  # the last lease of each region, by the region's index
        self._leases: dict[int, Lease] = {}  # by first epoch, those not freed
        self._alive: set[int] = set()  # first epochs whose memory is in use on this rank
        self._epoch = self._made = 0

    @property
    def regions(self) -> dict[int, Region]:
        """By index."""
        return {index: lease.region for index, lease in self._last.items()}

    @property
    def total_bytes(self) -> int:
        """Of all regions on this rank."""
        return sum(region.data_bytes for region in self.regions.values())

    @property
    def oldest_alive(self) -> int:
        """The first epoch that this rank still reads, or the next one."""
        return min(list(self._alive), default=self._epoch + 1)

    def take(self, data_bytes: int, steps: int = 1) -> Lease:
        """A region of at least so many bytes, the smallest that is free, and of equal ones that which is free longest.

        The region of the lease before is left alone: slower ranks may still read there while rows come here.
        Raises HeapError past the limit.
        """
        oldest = self._oldest()
        for first in [first for first, lease in self._leases.items() if lease.last < oldest]:
            self.free(self._leases[first])
        fitting = [last for last in self._free() if last.region.data_bytes >= data_bytes and last.last < self._epoch]
        before = min(fitting, key=lambda last: (last.region.data_bytes, last.last), default=None)
        region, after = (before.region, before.last) if before else (self._grow(data_bytes), 0)
        lease = Lease(region, self._epoch + 1, self._epoch + steps, after)
        self._epoch = lease.last
        self._last[region.index] = self._leases[lease.first] = lease
        self._alive.add(lease.first)
        return lease

    def token(self, lease: Lease) -> LeaseToken:
        """For the memory of a lease to hold: with it the lease ends on this rank."""
        token = LeaseToken()
        weakref.finalize(token, self._alive.discard, lease.first)
        return token

    def find(self, ticket: int) -> Lease | None:
        """The lease whose first epoch this is, unless it was freed."""
        return self._leases.get(ticket)

    def free(self, lease: Lease) -> None:
        """This rank has read it for the last time; on all ranks at the same point of the program."""
        del self._leases[lease.first]
        self._alive.discard(lease.first)
        self.fabric.free(lease.region, lease.last)

    def _free(self) -> Iterator[Lease]:
        """The last lease of each region that is free."""
        return (lease for lease in self._last.values() if lease.first not in self._leases)

    def _grow(self, data_bytes: int) -> Region:
        """A new region. The largest free one, which is too small, makes room for it."""
        self._settle()  # a rank with another plan might not come here: let headers say so first
        size = _rounded(max(data_bytes, self.start_bytes, 1))
        small = ((r.data_bytes, r.index) for r, *_ in self._free() if r.data_bytes < data_bytes)
        outgrown_bytes, outgrown = max(small, default=(0, 0))
        total = self.total_bytes + size - outgrown_bytes
        if self.limit_bytes and total > self.limit_bytes:
            raise HeapError(
                f"receive buffers need {_mib(total)} MiB on every rank, {_mib(total - self.limit_bytes)} MiB more than "
                f"heap_mib={_mib(self.limit_bytes)}: raise heap_mib, or take backward='refetch'"
            )
        if outgrown:
            self.fabric.retire(self._last[outgrown].region)
            del self._last[outgrown]  # nothing else may hold it: its memory makes room for the next one
        self._made += 1
        return self.fabric.allocate(self._made, size)


def _rounded(size: int) -> int:
    """Up by at most an eighth: plans differ from step to step, and growing costs every rank a stop."""
    grain = max(4096, 1 << max(size.bit_length() - 4, 0))
    return -(-size // grain) * grain


def _mib(size: int) -> str:
    return f"{size / MIB:.4g}"
