"""A CUDA device as the fabric sees it: torch's streams and events, the driver's stream memory operations.

`cuStreamWaitValue32` and `cuStreamWriteValue32` are executed by the stream itself. They take no SM, so they go on while
a kernel holds every one of them; the write comes after a fence for the whole system. A copy is a copy engine's. So
nothing that a kernel spins on can stand behind that kernel.
https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MEMOP.html

The fabric asks no more of a device than the public methods here, so that everything above them can run where there is
no GPU: the tests have a device that emulates streams, SMs and memory (`tests/emulation/`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from flashcp.comm.watchdog import Watchdog

Event = torch.cuda.Event
"""A point in a stream."""
Stream = torch.cuda.Stream
"""A queue of work; what it holds runs one after another."""

_SCRATCH_BYTES = 32 << 20  # what a throttled stream copies to the host, over and over


class CudaDevice:
    """One rank's device. What it is asked for is queued; the host goes on, except in `synchronize`.

    timeout_s: after which `watch` calls. Raises RuntimeError where the driver refuses."""

    def __init__(self, device: torch.device, timeout_s: float) -> None:
        from cuda.bindings import driver

        self.device, self._driver = device, driver
        self._watchdog = Watchdog(timeout_s)
        self._streams: list[torch.cuda.ExternalStream] = []
        torch.cuda.synchronize(device)  # makes the context, if nothing has yet
        (self._context,) = driver.cuCtxGetCurrent()[1:]
        self._threads = threading.local()
        wait = driver.CUstreamWaitValue_flags
        self._wait_flags = int(wait.CU_STREAM_WAIT_VALUE_GEQ)
        # Rows come before the flag that tells of them: where several links may reorder writes, this one orders them.
        index = device.index if device.index is not None else torch.cuda.current_device()
        flushes = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES
        if int(self._call("cuDeviceGetAttribute", flushes, index)):
            self._wait_flags |= int(wait.CU_STREAM_WAIT_VALUE_FLUSH)

    def new_stream(self, name: str) -> torch.cuda.ExternalStream:
        """A stream of its own, named in messages.

        None of torch's: its streams come from a pool, and two that wait for each other may be one.
        """
        _, highest = self._call("cuCtxGetStreamPriorityRange")
        kind = int(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        stream = torch.cuda.ExternalStream(int(self._call("cuStreamCreateWithPriority", kind, highest)), self.device)
        self._streams.append(stream)
        return stream

    def current_stream(self) -> Stream:
        """The stream that torch launches kernels on."""
        return torch.cuda.current_stream(self.device)

    def is_capturing(self) -> bool:
        """Whether the current stream is recorded into a graph, to be replayed later."""
        return torch.cuda.is_current_stream_capturing()

    def zeros(self, size: int) -> Tensor:
        """That many bytes, uint8, of this device's own."""
        return torch.zeros(size, dtype=torch.uint8, device=self.device)

    def wrap(self, memory: Tensor, token: object) -> Tensor:
        """The same memory, uint8, as a tensor whose storage keeps the token and the memory alive."""
        # What torch is given here lives as long as the tensor's storage.
        interface = memory.__cuda_array_interface__
        held = SimpleNamespace(memory=memory, token=token, __cuda_array_interface__=interface)
        return torch.as_tensor(held, device=self.device)

    def copy(self, into: Tensor, source: Tensor, stream: Stream) -> None:
        """Contiguous bytes, by a copy engine. Neither tensor is kept alive: see `keep`."""
        if source.nbytes:
            self._call("cuMemcpyAsync", into.data_ptr(), source.data_ptr(), source.nbytes, stream.cuda_stream)

    def wait_value(self, word: Tensor, value: int, stream: Stream) -> None:
        """Hold the stream until an int32 of this device's memory is at least `value`.

        The driver compares cyclically: right while epochs differ by less than 2^31.
        """
        self._call("cuStreamWaitValue32", stream.cuda_stream, word.data_ptr(), value, self._wait_flags)

    def write_value(self, word: Tensor, value: int, stream: Stream) -> None:
        """Write an int32, which may be another device's, after all that the stream did before."""
        self._call("cuStreamWriteValue32", stream.cuda_stream, word.data_ptr(), value, 0)

    def record(self, stream: Stream) -> Event:
        """The end of what the stream holds now."""
        return stream.record_event()

    def wait_event(self, stream: Stream, event: Event) -> None:
        """Hold the stream until another has come past an event."""
        stream.wait_event(event)

    def keep(self, memory: Tensor, stream: Stream) -> None:
        """Memory that dies from now on is used again only when the stream has done what it holds by then.

        Memory of regions is no memory of torch's allocator: there this does nothing, leases do.
        """
        memory.record_stream(stream)

    def delay(self, rows: Tensor, gbps: float, stream: Stream) -> None:
        """Hold the stream about as long as so many bytes take at a rate in GB/s, without an SM.

        As many bytes go to the host as take that long there. All streams of a GPU share that way.
        """
        host, there, host_gbps = _host_link(self.device)
        left = int(rows.nbytes * host_gbps / gbps)
        while left > 0:
            size = min(left, len(host))
            self.copy(host[:size], there[:size], stream)
            left -= size

    def watch(self, started: Event, ended: Event, late: Callable[[], None]) -> None:
        """Call `late`, from a thread of its own, unless `ended` comes within the time-out of `started`."""
        self._watchdog.watch(started, ended, late)

    def synchronize(self) -> None:
        """Return when all streams of this rank are done. Waits that never end are ended by whoever watches them."""
        for stream in (self.current_stream(), *self._streams):
            stream.synchronize()

    def _call(self, name: str, *arguments: Any) -> Any:
        """A function of the driver. Raises RuntimeError with the driver's own word for what went wrong."""
        if not getattr(self._threads, "bound", False):  # autograd and the watchdog come with threads of their own
            self._driver.cuCtxSetCurrent(self._context)
            self._threads.bound = True
        code, *results = getattr(self._driver, name)(*arguments)
        if code != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name} on {self.device}: {code.name}")
        return results[0] if len(results) == 1 else tuple(results)


@cache
def _host_link(device: torch.device) -> tuple[Tensor, Tensor, float]:
    """Memory of the host and of a GPU, uint8 of one size, and GB/s of a copy between them.

    Measured once, the best of four, while nothing else is on the device."""
    there = torch.zeros(_SCRATCH_BYTES, dtype=torch.uint8, device=device)
    host = torch.empty(_SCRATCH_BYTES, dtype=torch.uint8, pin_memory=True)
    times = []
    for _ in range(4):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        host.copy_(there, non_blocking=True)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return host, there, _SCRATCH_BYTES / min(times) / 1e6
