"""`nvshmem`: torch's NVSHMEM operators, across nodes. Written, never run.

`all_to_all_vdev` moves rows of any number between all ranks from GPU to GPU; it returns when all have arrived, so
there are no flags to wait on source by source. It reads and writes symmetric memory: rows pass through buffers that
are as large as the largest exchange so far and grow together on all ranks.

What it asks of its caller was read in its source (torch/csrc/distributed/c10d/symm_mem/nvshmem_extension.cu, and
NVSHMEMSymmetricMemory.cu for its memory):

- Each rank writes its counts into the others' memory, then all meet, then each fetches its rows. Nobody meets at the
  end. So a fast rank comes to the next exchange while slow ones still read its rows and their counts, and two exchanges
  that follow each other have a place of their own. The one behind them finds its place free: all met in between.
- It cuts the rows from each rank into equal pieces, and asserts on the device that they are equal. Rows that might not
  divide take NCCL.
- Symmetric memory is allocated by all ranks of the job together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from flashcp.comm.rows import Inbox, Leaving
from flashcp.comm.transport import Arrival
from flashcp.comm.two_sided import TwoSided
from flashcp.kernels.uploads import to_device

__all__ = ["Nvshmem", "grain_bytes"]

_LEAST_BYTES = 1 << 22  # of a buffer: from here on the operator launches its most blocks
_MOST_BLOCKS = (64, 16, 8)  # inside a node, between nodes, and between nodes in earlier versions
_SPLITS = 256  # kept on the device: of some tens of plans


@dataclass(frozen=True, eq=False)
class _Place:
    """Where one exchange lies: rows that leave, bytes for each rank (int64 [N]), bytes and offsets of what comes
    (int64 [2, N], written by the others)."""

    rows: Tensor
    splits: Tensor
    splits_there: Tensor


class Nvshmem(TwoSided):
    """A transport over the ranks of a group whose GPUs NVSHMEM connects.

    Raises ValueError for a group that is not all ranks of the job.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout_s: float, device: torch.device) -> None:
        super().__init__(group, timeout_s)
        if self.world_size != dist.get_world_size():
            raise ValueError(
                f"transport='nvshmem' over {self.world_size} of {dist.get_world_size()} ranks: expected a group of all "
                "ranks, which allocate NVSHMEM's memory together"
            )
        self.name = "nvshmem"
        self._device = device
        self._group = group if group is not None else dist.distributed_c10d._get_default_group()
        self._open()
        self._turn, self._grain = 0, grain_bytes(self.world_size)
        counts = [(self._memory(8 * self.world_size), self._memory(16 * self.world_size)) for _ in range(2)]
        none = torch.empty(0, dtype=torch.uint8, device=device)
        self._places = [
            _Place(none, own.view(torch.int64), there.view(torch.int64).view(2, self.world_size))
            for own, there in counts
        ]
        self._arrived = none
        self._splits_of = lru_cache(maxsize=_SPLITS)(lambda splits: to_device(np.array(splits), device))

    def inbox(self, rows: int, most: int, row: Sequence[int], like: Tensor, steps: int = 1) -> Inbox:
        """See Transport. The buffers grow here, where all ranks know the largest exchange."""
        size = most * like.element_size() * math.prod(row)
        if size > len(self._arrived) or not len(self._arrived):  # an exchange of no rows wants a buffer, too
            self._grow(max(size, len(self._arrived) * 5 // 4, _LEAST_BYTES))
        return super().inbox(rows, most, row, like, steps)

    def all_to_all(
        self, leaving: Leaving, sent: Sequence[int], inbox: Inbox, received: Sequence[int], offsets: Sequence[int]
    ) -> Arrival:
        """See Transport. Rows arrive in the order of their sources."""
        row_bytes = inbox.rows.element_size() * math.prod(inbox.rows.shape[1:])
        if row_bytes % self._grain:
            return super().all_to_all(leaving, sent, inbox, received, offsets)
        self.waits.check()
        rows, place = leaving.packed(), self._places[self._turn]
        self._turn = 1 - self._turn
        with self._beside():
            place.rows[: rows.nbytes].copy_(rows.reshape(-1).view(torch.uint8))
            place.splits.copy_(self._splits_of(tuple(count * row_bytes for count in sent)))
            self._exchange(place, self._arrived)
            inbox.rows.reshape(-1).view(torch.uint8).copy_(self._arrived[: inbox.rows.nbytes])
            works = [self._mark()]
        self.sent_bytes += (sum(sent) - sent[self.rank]) * row_bytes
        return self._arrival(works, rows, inbox.rows, leaving.what)

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

    def _grow(self, size: int) -> None:
        """Buffers for `size` bytes that arrive; the host waits. All ranks come here together, each when all it asked
        for has arrived: when the new ones are made, nobody reads the old ones any more."""
        self.synchronize()
        leaving = self.world_size * size  # what a rank sends to all is at most what all ranks receive
        rows = [self._memory(leaving) for _ in self._places]
        self._arrived = self._memory(size)
        self._places = [_Place(new, old.splits, old.splits_there) for new, old in zip(rows, self._places, strict=True)]

    # What only a GPU has.

    def _open(self) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        symmetric.set_backend("NVSHMEM")
        self._stream = torch.cuda.Stream(self._device)

    def _memory(self, size: int) -> Tensor:
        """Symmetric bytes. The tensor owns them; the operator asks for their handles itself."""
        from torch.distributed import _symmetric_memory as symmetric

        memory = symmetric.empty(size, dtype=torch.uint8, device=self._device)
        symmetric.rendezvous(memory, self._group)
        return memory

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """In this transport's own stream, behind what the current one was told so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def _exchange(self, place: _Place, arrived: Tensor) -> None:
        torch.ops.symm_mem.all_to_all_vdev(
            place.rows, arrived, place.splits, place.splits_there, self._group.group_name
        )

    def _mark(self) -> Any:
        return _InStream(self._stream.record_event())


def grain_bytes(world_size: int) -> int:
    """The number of bytes that a row must be a multiple of, for the pieces of each rank's rows to be equal."""
    return math.lcm(*(max(1, blocks // world_size) for blocks in _MOST_BLOCKS))


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
    """Work of a stream, for the current stream to wait for."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)
