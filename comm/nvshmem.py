"""`nvshmem`: torch's NVSHMEM operators, across nodes. Written, never run: torch gives no group of one
rank memory over NVSHMEM, and no two GPUs were at hand.

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
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from flashcp.comm.transport import ALL, Inbox, OutgoingRows, Transfer, row_bytes
from flashcp.comm.two_sided import Operation, TwoSided
from flashcp.kernels.uploads import to_device

_LEAST_BYTES = 1 << 22  # of a buffer: from here on the operator launches its most blocks
_MOST_BLOCKS = (64, 16, 8)  # inside a node, between nodes, and between nodes in earlier versions
_SPLITS = 256  # kept on the device: of some tens of plans


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
        self._grain = grain_bytes(self.world_size)
        # Two places, which exchanges take in turn: rows that leave, bytes for each rank (int64 [N]), bytes and offsets
        # of what comes (int64 [2, N], written by the others).
        self._turn = 0
        self._leaving = [torch.empty(0, dtype=torch.uint8, device=device)] * 2
        self._splits = [self._memory(8 * self.world_size).view(torch.int64) for _ in range(2)]
        self._splits_there = [self._memory(16 * self.world_size).view(torch.int64).view(2, -1) for _ in range(2)]
        self._arrived = self._leaving[0]
        self._splits_of = lru_cache(maxsize=_SPLITS)(lambda splits: to_device(np.array(splits), device))

    def inbox(self, rows: int, most: int, row: Sequence[int], like: Tensor, steps: int = 1) -> Inbox:
        """The buffers grow here, where all ranks know the largest exchange."""
        size = most * like.element_size() * math.prod(row)
        if size > len(self._arrived) or not len(self._arrived):  # an exchange of no rows wants a buffer, too
            self._grow(max(size, len(self._arrived) * 5 // 4, _LEAST_BYTES))
        return super().inbox(rows, most, row, like, steps)

    def all_to_all(
        self, outgoing: OutgoingRows, sent: Sequence[int], inbox: Inbox, received: Sequence[int], offsets: Sequence[int]
    ) -> Transfer:
        """Rows arrive in the order of their sources."""
        size = row_bytes(inbox.rows)
        if size % self._grain:
            return super().all_to_all(outgoing, sent, inbox, received, offsets)
        self.waits.check()
        rows, turn = outgoing.packed(), self._turn
        self._turn = 1 - turn
        with self._beside():
            self._leaving[turn][: rows.nbytes].copy_(rows.reshape(-1).view(torch.uint8))
            self._splits[turn].copy_(self._splits_of(tuple(count * size for count in sent)))
            self._exchange(turn, self._arrived)
            inbox.rows.reshape(-1).view(torch.uint8).copy_(self._arrived[: inbox.rows.nbytes])
            works = [Operation(self._mark(), ALL, f"{outgoing.what} of another rank")]
        self.sent_bytes += (sum(sent) - sent[self.rank]) * size
        return self._start(works, [rows, inbox.rows], outgoing.what)

    def all_gather(self, block: OutgoingRows, inbox: Inbox) -> Transfer:
        """The block leaves once for each rank."""
        ranks, rows = self.world_size, len(block)
        packed = block.packed()
        repeated = OutgoingRows(packed.repeat(ranks, *[1] * (packed.dim() - 1)), what=block.what)
        return self.all_to_all(repeated, [rows] * ranks, inbox, [rows] * ranks, [rows * self.rank] * ranks)

    def shift(self, outgoing: OutgoingRows, inbox: Inbox, step: int, into: slice, offset: int) -> Transfer:
        sent, received = [0] * self.world_size, [0] * self.world_size
        sent[(self.rank + 1) % self.world_size] = len(outgoing)
        received[(self.rank - 1) % self.world_size] = into.stop - into.start
        return self.all_to_all(outgoing, sent, Inbox(inbox.rows[into]), received, [0] * self.world_size)

    def _grow(self, size: int) -> None:
        """Buffers for `size` bytes that arrive; the host waits. All ranks come here together, each when all it asked
        for has arrived: when the new ones are made, nobody reads the old ones any more."""
        self.synchronize()
        # What a rank sends to all is at most what all ranks receive.
        self._leaving = [self._memory(self.world_size * size) for _ in range(2)]
        self._arrived = self._memory(size)

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

    def _exchange(self, turn: int, arrived: Tensor) -> None:
        splits, splits_there = self._splits[turn], self._splits_there[turn]
        torch.ops.symm_mem.all_to_all_vdev(self._leaving[turn], arrived, splits, splits_there, self._group.group_name)

    def _mark(self) -> Any:
        """Work of the stream: its `wait()` is that of the current stream."""
        return self._stream.record_event()


def grain_bytes(world_size: int) -> int:
    """The number of bytes that a row must be a multiple of, for the pieces of each rank's rows to be equal."""
    return math.lcm(*(max(1, blocks // world_size) for blocks in _MOST_BLOCKS))


def is_available() -> bool:
    """Whether this torch has NVSHMEM and finds its library."""
    from torch.distributed import _symmetric_memory as symmetric

    return symmetric.is_nvshmem_available()
