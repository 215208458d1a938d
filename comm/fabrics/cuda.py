"""GPUs that map each other's memory: copy engines move rows, kernels raise and await flags. Written, never run.

Memory comes from torch's symmetric memory (NVLink or CUDA IPC, one host), or from one GPU for ranks that are streams of
one process. Everything is ordered by streams: puts by one of this fabric's own, waits and acknowledgements by the
stream that is current where they are asked for. The host waits for nothing; a wait that ends in vain is noted on the
device, and raised at this rank's next call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from flashcp.comm.clock import span
from flashcp.comm.errors import ExchangeTimeoutError, HeapError
from flashcp.comm.fabrics.base import NO_PUT, Put, Region, Ticking
from flashcp.kernels.arrivals import Arrivals

__all__ = ["CudaFabric", "symmetric_memories"]

_HEAD_BYTES = 4096  # two rows of flags, for up to 512 ranks
_CYCLES = 20_000_000
Memories = Callable[[int, int], list[Tensor]]


@dataclass(frozen=True, eq=False)
class CudaRegion(Region):
    """memories: bytes of every rank, as this rank addresses them. bases: their addresses, int64 [N] on the device."""

    memories: list[Tensor]
    bases: Tensor

    def flags(self, rank: int) -> Tensor:
        """Arrived and freed, int32 [2, N], of a rank."""
        ranks = len(self.memories)
        return self.memories[rank][: 8 * ranks].view(torch.int32).view(2, ranks)


class CudaFabric:
    """memories(index, size): that many zero bytes on every rank's GPU, as this rank addresses them.

    throttle_gbps: GB/s at which rows leave, kept by a kernel that does nothing; 0: at once.
    """

    def __init__(
        self,
        name: str,
        rank: int,
        world_size: int,
        device: torch.device,
        memories: Memories,
        timeout_s: float,
        throttle_gbps: float = 0.0,
    ) -> None:
        if 8 * world_size > _HEAD_BYTES:
            raise ValueError(f"world_size={world_size}: expected at most {_HEAD_BYTES // 8} ranks over {name}")
        self.name, self.rank, self.world_size = name, rank, world_size
        self.sent_bytes, self.timeout_s, self.throttle_gbps = 0, timeout_s, throttle_gbps
        self._device, self._memories = device, memories
        self._stream = torch.cuda.Stream(device)
        self._under_way: list[tuple[torch.cuda.Event, int]] = []
        self._stuck = torch.zeros(1, dtype=torch.int32, device=device)
        self._seen = torch.zeros(1, dtype=torch.int32).pin_memory()
        self._cycles_per_s = _cycles_per_s() if throttle_gbps else 0.0
        self._ranks = torch.arange(world_size, dtype=torch.int32, device=device)

    @property
    def oldest_put(self) -> int:
        """See Fabric."""
        self._under_way = [(event, epoch) for event, epoch in self._under_way if not event.query()]
        return min((epoch for _, epoch in self._under_way), default=NO_PUT)

    def allocate(self, index: int, data_bytes: int) -> Region:
        """See Fabric."""
        try:
            memories = self._memories(index, _HEAD_BYTES + data_bytes)
        except torch.OutOfMemoryError as error:
            raise HeapError(f"rank {self.rank}: no {data_bytes >> 20} MiB for receive buffers on its GPU") from error
        bases = torch.tensor([memory.data_ptr() for memory in memories], device=self._device)
        return CudaRegion(index, data_bytes, memories, bases)

    def tensor(self, region: Region, rows: int, row: Sequence[int], dtype: torch.dtype, token: object) -> Tensor:
        """See Fabric."""
        size = rows * int(np.prod(tuple(row), dtype=np.int64)) * dtype.itemsize
        if not size:
            return torch.empty((rows, *row), dtype=dtype, device=self._device)
        memory = _of(region).memories[self.rank][_HEAD_BYTES : _HEAD_BYTES + size]
        return torch.as_tensor(_Held(memory, token), device=self._device).view(dtype).view(rows, *row)

    def put(self, puts: Sequence[Put]) -> Ticking:
        """See Fabric. Rows are packed once, then each rank's leave in one piece by a copy engine."""
        self._raise_late()
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            self._stream.wait_stream(current)
            if puts:
                packed = puts[0].leaving.packed()
                packed.record_stream(self._stream)
                for put in puts:
                    with span(f"send {put.leaving.what} to rank {put.to}"):
                        self._carry(put, packed[put.start : put.stop])
                self._note()
            sent = self._stream.record_event()
        self._under_way += [(sent, put.epoch) for put in puts[:1]]
        return _Sent(sent)

    def _carry(self, put: Put, rows: Tensor) -> None:
        from flashcp.kernels import transfers

        region, to = _of(put.region), self._ranks[put.to : put.to + 1]
        transfers.wait(to, Arrivals(region.flags(self.rank)[1], put.after, self._stuck, self.timeout_s))
        start = _HEAD_BYTES + put.offset
        region.memories[put.to][start : start + rows.nbytes].copy_(rows.reshape(-1).view(torch.uint8))
        if self.throttle_gbps and put.to != self.rank:
            torch.cuda._sleep(int(rows.nbytes / self.throttle_gbps / 1e9 * self._cycles_per_s))
        transfers.signal(to, region.bases, self.rank, 0, put.epoch)
        self.sent_bytes += rows.nbytes * (put.to != self.rank)

    def wait(self, region: Region, source: int, epoch: int) -> None:
        """See Fabric."""
        from flashcp.kernels import transfers

        self._raise_late()
        flags = self.flags(region, epoch)
        transfers.wait(self._ranks[source : source + 1], flags)
        self._note()

    def free(self, region: Region, epoch: int) -> None:
        """See Fabric."""
        from flashcp.kernels import transfers

        transfers.signal(self._ranks, _of(region).bases, self.rank, 4 * self.world_size, epoch)

    def flags(self, region: Region, epoch: int) -> Arrivals:
        """See Fabric."""
        return Arrivals(_of(region).flags(self.rank)[0], epoch, self._stuck, self.timeout_s)

    def check(self, flags: Arrivals) -> None:
        """See Fabric. What a kernel notes now is raised at the next call: the host does not wait for it."""
        self._note()
        self._raise_late()

    def _note(self) -> None:
        """Bring what kernels noted so far to the host, in stream order."""
        self._seen.copy_(self._stuck, non_blocking=True)

    def _raise_late(self) -> None:
        if late := int(self._seen):
            raise ExchangeTimeoutError(f"rank {self.rank} waited {self.timeout_s:g} s for the rows of rank {late - 1}")


class _Sent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def leave(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)


class _Held:
    """Memory on a GPU that holds a token, for torch to wrap."""

    def __init__(self, memory: Tensor, token: object) -> None:
        self._memory, self._token = memory, token

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self._memory.__cuda_array_interface__


def _cycles_per_s() -> float:
    """Of the kernel that does nothing, measured once."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.cuda._sleep(_CYCLES)
    stop.record()
    stop.synchronize()
    return 1e3 * _CYCLES / start.elapsed_time(stop)


def _of(region: Region) -> CudaRegion:
    assert isinstance(region, CudaRegion)
    return region


def symmetric_memories(
    group: dist.ProcessGroup, device: torch.device, share: Callable[[bytes], list[bytes]]
) -> Memories:
    """torch's symmetric memory over the ranks of a group, each with a GPU of its own or sharing one.

    Ranks that share a GPU need TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1, and a gloo group.
    """
    from torch.distributed import _symmetric_memory as symmetric

    def memories(index: int, size: int) -> list[Tensor]:
        own = symmetric.empty(size, dtype=torch.uint8, device=device)
        handle = symmetric.rendezvous(own, group)
        own[:_HEAD_BYTES].zero_()
        torch.cuda.synchronize(device)
        share(b"+")  # nobody raises a flag before it was zeroed
        ranks = range(dist.get_world_size(group))
        return [handle.get_buffer(rank, (size,), torch.uint8) for rank in ranks]

    return memories
