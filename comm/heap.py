"""A symmetric heap: regions at the same index on every rank, leased to one exchange after another.

All ranks take and free leases at the same points of the program, so they choose the same region without a word, and
allocate together when none is free. A lease that nobody frees (its graph was thrown away, or recomputed by activation
checkpointing) ends with its memory; ranks notice that at different times, so its region is taken again only when the
headers of all ranks say that they read nothing so old.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

from flashcp.comm.errors import HeapError
from flashcp.comm.fabrics.base import Fabric, Region

__all__ = ["Lease", "LeaseToken", "SymmetricHeap"]

MIB = 1 << 20


class LeaseToken:
    """Lives as long as the memory of a lease: its end is noticed."""


@dataclass(eq=False)
class Lease:
    """A region for one exchange. Its steps bring rows under epochs first, ..., last; after: the epoch of the lease
    before, which its readers must have freed before rows are put."""

    region: Region
    first: int
    last: int
    after: int
    freed: bool = False


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
        self.regions: dict[int, Region] = {}
        self._last: dict[int, Lease] = {}  # by index of the region
        self._leases: dict[int, Lease] = {}  # by first epoch, those not freed
        self._alive: set[int] = set()  # first epochs whose memory is in use on this rank
        self._epoch = self._made = 0

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
        self._reclaim()
        fitting = [r for r in self._free() if r.data_bytes >= data_bytes and self._last_epoch(r) < max(self._epoch, 1)]
        region = min(fitting, key=lambda r: (r.data_bytes, self._last_epoch(r)), default=None) or self._grow(data_bytes)
        lease = Lease(region, self._epoch + 1, self._epoch + steps, self._last_epoch(region))
        self._epoch += steps
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
        if not lease.freed:
            lease.freed = True
            del self._leases[lease.first]
            self._alive.discard(lease.first)
            self.fabric.free(lease.region, lease.last)

    def _reclaim(self) -> None:
        oldest = self._oldest()
        for lease in list(self._leases.values()):
            if lease.last < oldest:
                self.free(lease)

    def _free(self) -> list[Region]:
        return [r for r in self.regions.values() if r.index not in self._last or self._last[r.index].freed]

    def _last_epoch(self, region: Region) -> int:
        return self._last[region.index].last if region.index in self._last else 0

    def _outgrown(self, data_bytes: int) -> int:
        """Index of the largest free region that is too small; 0 where there is none."""
        small = [region for region in self._free() if region.data_bytes < data_bytes]
        return max(((region.data_bytes, region.index) for region in small), default=(0, 0))[1]

    def _grow(self, data_bytes: int) -> Region:
        self._settle()  # a rank with another plan might not come here: let headers say so first
        size = _rounded(max(data_bytes, self.start_bytes, 1))
        outgrown = self._outgrown(data_bytes)
        total = self.total_bytes + size - (self.regions[outgrown].data_bytes if outgrown else 0)
        if self.limit_bytes and total > self.limit_bytes:
            raise HeapError(
                f"receive buffers need {_mib(total)} MiB on every rank, {_mib(total - self.limit_bytes)} MiB more than "
                f"heap_mib={_mib(self.limit_bytes)}: raise heap_mib, or take backward='refetch'"
            )
        if outgrown:
            self.fabric.retire(self.regions[outgrown])
            del self.regions[outgrown]  # nothing else may hold it: its memory makes room for the next one
            self._last.pop(outgrown, None)
        self._made += 1
        region = self.fabric.allocate(self._made, size)
        self.regions[region.index] = region
        return region


def _rounded(size: int) -> int:
    """Up by at most an eighth: plans differ from step to step, and growing costs every rank a stop."""
    grain = max(4096, 1 << max(size.bit_length() - 4, 0))
    return -(-size // grain) * grain


def _mib(size: int) -> str:
    return f"{size / MIB:.4g}"
