"""GPUs that map each other's memory: streams move rows and flags, no kernel does.

Run on an H100 so far between ranks that are streams of one process. Between processes the first run ended in time-outs
(see `symmetric_memories`); what mends that was not run since. Between GPUs it was never run.

A put is three operations on a stream of its target's own: wait until the target has freed the lease before, copy the
rows, raise the flag behind them. Rows that must be picked are packed before, by one kernel on the stream that made
them. Rows are awaited by the stream that computes on them. None of this needs an SM (`cuda_device.py`), a later launch
or the host.

The host waits for nothing. A wait that does not end is noticed by the device's watchdog, which notes who waited for
whom and lets the streams go on, on garbage; the error is raised at this rank's next call, or by `synchronize`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from flashcp.comm.clock import span
from flashcp.comm.errors import ExchangeError, HeapError
from flashcp.comm.fabrics.base import ARRIVED, FREED, NO_PUT, Fabric, Put, Region, head_bytes
from flashcp.comm.fabrics.cuda_device import CudaDevice, Event, Stream
from flashcp.comm.fabrics.memory import agreed
from flashcp.kernels.interface import WaitFlags

_HEAD_BYTES = head_bytes(1)  # two rows of flags, for up to 512 ranks
_PAST_ALL = 2**30  # an epoch that no exchange comes to: ends every wait

Memories = Callable[[int, int], tuple[Sequence[Tensor], object]]
"""(index, size) -> that many bytes on every rank's device, uint8, and their owner: see `Region`. All ranks call it
together."""


class CudaFabric(Fabric):
    """memories: their first 4,096 bytes are zero. retire(region): see Fabric."""

    def __init__(
        self,
        name: str,
        rank: int,
        world_size: int,
        device: CudaDevice,
        memories: Memories,
        retire: Callable[[Region], None],
        timeout_s: float,
        throttle_gbps: float = 0.0,
    ) -> None:
        if 8 * world_size > _HEAD_BYTES:
            raise ValueError(f"world_size={world_size}: expected at most {_HEAD_BYTES // 8} ranks over {name}")
        super().__init__(name, rank, world_size, timeout_s, throttle_gbps)
        self._device, self._memories, self._retire = device, memories, retire
        self._stream_to = cache(lambda rank: device.new_stream(f"puts to rank {rank}"))
        self._rescue = device.new_stream("end of all waits")
        self._under_way: list[tuple[list[Event], int]] = []
        self._regions: WeakSet[Region] = WeakSet()
        self._stuck = device.zeros(4).view(torch.int32)  # written by kernels that waited in vain
        self._seen = torch.zeros(1, dtype=torch.int32, pin_memory=self._stuck.is_cuda)
        self._late = ""
        self._lock = threading.Lock()
        self.waiting = True  # False: nothing waits and nothing computed counts, so that kernels can be loaded
        if throttle_gbps:
            device.delay(self._stuck[:0], throttle_gbps, device.current_stream())  # measures what it needs to know

    @property
    def oldest_put(self) -> int:
        self._refuse_capture()  # which a look at an event would end
        self._under_way = [(events, epoch) for events, epoch in self._under_way if not all(e.query() for e in events)]
        return min((epoch for _, epoch in self._under_way), default=NO_PUT)

    def allocate(self, index: int, data_bytes: int) -> Region:
        try:
            memories, owner = self._memories(index, _HEAD_BYTES + data_bytes)
        except torch.OutOfMemoryError as error:
            raise HeapError(
                f"rank {self.names[self.rank]}: no {data_bytes >> 20} MiB for receive buffers on its GPU"
            ) from error
        region = Region(index, data_bytes, memories, owner)
        with self._lock:
            self._regions.add(region)
        return region

    def retire(self, region: Region) -> None:
        """The host may be far ahead of the devices: what they still read and write must come first."""
        self._retire(region)

    def tensor(self, region: Region, rows: int, row: Sequence[int], dtype: torch.dtype, token: object) -> Tensor:
        size = rows * math.prod(row) * dtype.itemsize
        if not size:
            return self._stuck[:0].view(dtype).view(rows, *row)  # of this device, and of no region
        held = (token, region)  # the region's memory, as long as a tensor shares it
        return self._device.wrap(region.data(self.rank, 0, size), held).view(dtype).view(rows, *row)

    def put(self, puts: Sequence[Put]) -> Callable[[], None]:
        """Rows are packed once, then each rank's leave in one piece."""
        self._begin()
        device, events = self._device, list[Event]()
        if puts:
            # Packed on the stream that made the rows: whoever writes to them, or takes their memory, comes behind it.
            packed = puts[0].outgoing.packed()
            ready = device.record(device.current_stream())
            for put in puts:
                with span(f"send {put.outgoing.what} to rank {self.names[put.to]}"):
                    stream = self._stream_to(put.to)
                    device.wait_event(stream, ready)
                    self._send(put, packed[put.start : put.stop], stream)
                    device.keep(packed, stream)
                    events.append(device.record(stream))
            self._under_way.append((events, puts[0].epoch))

        def leave() -> None:
            for event in events:
                device.wait_event(device.current_stream(), event)

        return leave

    def _send(self, put: Put, rows: Tensor, stream: Stream) -> None:
        region, device = put.region, self._device
        what = f"rank {self.names[put.to]} to free its receive buffer"
        self._wait(region.flag(self.rank, FREED, put.to), put.after, stream, what)
        into = region.data(put.to, put.offset, rows.nbytes)
        if into.nbytes != rows.nbytes:  # ranks with other plans hear so of headers, which may come after the rows
            raise ExchangeError(
                f"rank {self.names[self.rank]}: {rows.nbytes} bytes do not fit the receive buffer of rank "
                f"{self.names[put.to]}"
            )
        device.copy(into, rows.reshape(-1).view(torch.uint8), stream)
        if self.throttle_gbps and put.to != self.rank:
            device.delay(rows, self.throttle_gbps, stream)
        device.write_value(region.flag(put.to, ARRIVED, self.rank), put.epoch, stream)
        self.sent_bytes += rows.nbytes * (put.to != self.rank)

    def wait(self, region: Region, source: int, epoch: int) -> None:
        self._begin()
        word = region.flag(self.rank, ARRIVED, source)
        self._wait(word, epoch, self._device.current_stream(), f"the rows of rank {self.names[source]}")

    def free(self, region: Region, epoch: int) -> None:
        stream = self._device.current_stream()
        for rank in range(self.world_size):
            self._device.write_value(region.flag(rank, FREED, self.rank), epoch, stream)

    def flags(self, region: Region, epoch: int) -> WaitFlags:
        self._begin()
        return WaitFlags(region.flags[self.rank][ARRIVED], epoch * self.waiting, self._stuck, self.timeout_s)

    def check(self, flags: WaitFlags) -> None:
        """What the kernel notes is raised later: the host does not wait for it."""
        self._seen.copy_(self._stuck, non_blocking=True)

    def synchronize(self) -> None:
        self._seen.copy_(self._stuck, non_blocking=True)
        self._device.synchronize()
        self._raise_late()

    def _begin(self) -> None:
        """Raise what went wrong since, and refuse what cannot work: epochs are numbers of this very call."""
        self._raise_late()
        self._refuse_capture()

    def _refuse_capture(self) -> None:
        if self._device.is_capturing():
            raise RuntimeError(
                f"transport={self.name!r} under CUDA graph capture: a replay would find the flags of this call up and "
                "wait for nothing; expected transport='nccl'"
            )

    def _wait(self, word: Tensor, epoch: int, stream: Stream, what: str) -> None:
        if epoch <= 0 or not self.waiting:
            return  # of a fresh region: nobody was there before
        device = self._device
        started = device.record(stream)
        device.wait_value(word, epoch, stream)
        device.watch(started, device.record(stream), partial(self.give_up, f"{what} (epoch {epoch})"))

    def give_up(self, what: str) -> None:
        """Note that a wait took too long, and end all waits of this rank: nobody hangs, and nothing computed counts."""
        with self._lock:
            self._late = self._late or what
            for region in list(self._regions):
                for row in (ARRIVED, FREED):
                    for rank in range(self.world_size):
                        self._device.write_value(region.flag(self.rank, row, rank), _PAST_ALL, self._rescue)

    def _raise_late(self) -> None:
        source = int(self._seen)
        what = self._late or (f"the rows of rank {self.names[source - 1]}" if source else "")
        if what:
            raise self.timed_out(what)


def symmetric_memories(
    symmetric: Any,
    group: dist.ProcessGroup,
    rank: int,
    device: CudaDevice,
    torch_device: torch.device,
    share: Callable[[bytes], list[bytes]],
    names: Sequence[int] | None = None,
) -> Memories:
    """torch's symmetric memory over the ranks of a group, each with a GPU of its own or sharing one.

    symmetric: the module `torch.distributed._symmetric_memory`. share: gives every rank's bytes to every rank. names:
    what errors call ranks. Ranks that share a GPU need TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1, and a gloo group.
    What is returned raises HeapError on all ranks when one of them has no memory.
    """

    def memories(index: int, size: int) -> tuple[Sequence[Tensor], object]:
        blame = f"rank {names[rank] if names else rank}: no {size >> 20} MiB for receive buffers on its GPU"
        make = partial(symmetric.empty, size, dtype=torch.uint8, device=torch_device)
        own, _ = agreed(share, make, RuntimeError, blame)
        handle = symmetric.rendezvous(own, group)
        own[:_HEAD_BYTES].zero_()
        device.synchronize()
        # torch may take several allocations from one block, and its handle's buffers begin where the block does.
        begin = own.data_ptr() - handle.get_buffer(handle.rank, (size,), torch.uint8).data_ptr()
        begins = [int(word) for word in share(str(begin).encode())]  # and nobody raises a flag before it was zeroed
        tensors = [handle.get_buffer(rank, (size,), torch.uint8, at) for rank, at in enumerate(begins)]
        # Neither `handle` nor its buffers keep the allocation: `own` does, and the handle the mapping of the others'.
        return tensors, (own, handle)

    return memories
