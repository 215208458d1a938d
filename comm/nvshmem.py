"""`nvshmem`: torch's NVSHMEM operators, across nodes. Written, never run.

`all_to_all_vdev` moves rows of any number between all ranks from GPU to GPU; it returns when all have arrived, so
there are no flags to wait on source by source. It reads and writes symmetric memory: rows pass through two buffers
that are as large as the largest exchange so far and grow together on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from flashcp.comm.rows import Inbox, Leaving
from flashcp.comm.transport import Arrival
from flashcp.comm.two_sided import TwoSided
from flashcp.kernels.arrivals import Arrivals

__all__ = ["Nvshmem"]


class Nvshmem(TwoSided):
    """A transport over the ranks of a group whose GPUs NVSHMEM connects."""

    def __init__(self, group: dist.ProcessGroup | None, timeout_s: float, device: torch.device) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        super().__init__(group, timeout_s)
        symmetric.set_backend("NVSHMEM")
        self.name = "nvshmem"
        self._symmetric, self._device = symmetric, device
        self._group = group if group is not None else dist.distributed_c10d._get_default_group()
        self._stream = torch.cuda.Stream(device)
        self._splits = self._memory(8 * self.world_size).view(torch.int64)
        self._splits_there = self._memory(16 * self.world_size).view(torch.int64).view(2, self.world_size)
        self._buffers: tuple[Tensor, Tensor] | None = None

    def inbox(self, rows: int, most: int, row: Sequence[int], like: Tensor, steps: int = 1) -> Inbox:
        """See Transport. The buffers grow here, where all ranks know the largest exchange."""
        inbox = super().inbox(rows, most, row, like, steps)
        # What a rank sends to all is at most what all ranks receive.
        size = self.world_size * most * like.element_size() * math.prod(row)
        if self._buffers is None or len(self._buffers[0]) < size:
            self._buffers = self._memory(size), self._memory(size)
        return inbox

    def all_to_all(
        self, leaving: Leaving, sent: Sequence[int], inbox: Inbox, received: Sequence[int], offsets: Sequence[int]
    ) -> Arrival:
        """See Transport. Rows arrive in the order of their sources."""
        assert self._buffers is not None, "rows leave after inbox() was called for them"
        source, target = self._buffers
        rows = leaving.packed()
        row_bytes = rows.element_size() * math.prod(rows.shape[1:])
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            source[: rows.nbytes].copy_(rows.reshape(-1).view(torch.uint8))
            self._splits.copy_(torch.tensor([count * row_bytes for count in sent]))
            torch.ops.symm_mem.all_to_all_vdev(source, target, self._splits, self._splits_there, self._group.group_name)
            inbox.rows.reshape(-1).view(torch.uint8).copy_(target[: inbox.rows.nbytes])
            rows.record_stream(self._stream)
        self.sent_bytes += (sum(sent) - sent[self.rank]) * row_bytes
        return _InStream(self._stream.record_event())

    def all_gather(self, block: Leaving, inbox: Inbox) -> Arrival:
        """See Transport. The block leaves once for each rank."""
        ranks, rows = self.world_size, len(block)
        repeated = _Repeated(block, ranks)
        return self.all_to_all(repeated, [rows] * ranks, inbox, [rows] * ranks, [rows * self.rank] * ranks)

    def shift(self, leaving: Leaving, inbox: Inbox, step: int, into: slice, offset: int) -> Arrival:
        """See Transport."""
        sent, received = [0] * self.world_size, [0] * self.world_size
        sent[(self.rank + 1) % self.world_size] = len(leaving)
        received[(self.rank - 1) % self.world_size] = into.stop - into.start
        return self.all_to_all(leaving, sent, Inbox(inbox.rows[into]), received, [0] * self.world_size)

    def _memory(self, size: int) -> Tensor:
        memory = self._symmetric.empty(size, dtype=torch.uint8, device=self._device)
        self._symmetric.rendezvous(memory, self._group)
        return memory


class _Repeated:
    """The same rows once for each rank."""

    def __init__(self, rows: Leaving, times: int) -> None:
        self._rows, self._times = rows, times
        self.what = rows.what

    def __len__(self) -> int:
        return self._times * len(self._rows)

    def packed(self) -> Tensor:
        rows = self._rows.packed()
        return rows.repeat(self._times, *[1] * (rows.dim() - 1))

    def write(self, into: Tensor, start: int, stop: int) -> None:
        into.copy_(self.packed()[start:stop])


class _InStream:
    """Rows that are there for what is launched after `wait`."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self, source: int | None = None) -> None:
        torch.cuda.current_stream().wait_event(self._event)

    def leave(self) -> None:
        self.wait()

    def flags(self) -> Arrivals | None:
        return None

    def check(self, flags: Arrivals) -> None:
        pass
