"""What the CUDA fabric asks of a device: streams, and the few things it puts on them.

The interface is as narrow as the fabric needs, so that everything above it can run where there is no GPU. `CudaDevice`
(`cuda_device.py`) is the real one; the tests have one that emulates streams, SMs and memory (`tests/emulation/`).

None of these operations but torch's own kernels needs an SM: a copy is a copy engine's, a wait and a write are the
stream's own. So nothing that a kernel spins on can stand behind that kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Device", "Event", "Stream"]

Stream = Any
"""A queue of work; what it holds runs one after another."""


class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """Whether the stream has come past it."""


class Device(Protocol):
    """One rank's device. What it is asked for is queued; the host goes on, except in `synchronize`."""

    def new_stream(self, name: str) -> Stream:
        """A stream of its own, named in messages."""

    def current_stream(self) -> Stream:
        """The stream that torch launches kernels on."""

    def is_capturing(self) -> bool:
        """Whether the current stream is recorded into a graph, to be replayed later."""

    def zeros(self, size: int) -> Tensor:
        """That many bytes, uint8, of this device's own."""

    def wrap(self, memory: Tensor, token: object) -> Tensor:
        """The same memory, uint8, as a tensor whose storage keeps the token and the memory alive."""

    def copy(self, into: Tensor, source: Tensor, stream: Stream) -> None:
        """Contiguous bytes, by a copy engine. Neither tensor is kept alive: see `keep`."""

    def wait_value(self, word: Tensor, value: int, stream: Stream) -> None:
        """Hold the stream until an int32 of this device's memory is at least `value`."""

    def write_value(self, word: Tensor, value: int, stream: Stream) -> None:
        """Write an int32, which may be another device's, after all that the stream did before."""

    def record(self, stream: Stream) -> Event:
        """The end of what the stream holds now."""

    def wait_event(self, stream: Stream, event: Event) -> None:
        """Hold the stream until another has come past an event."""

    def keep(self, memory: Tensor, stream: Stream) -> None:
        """Memory that dies from now on is used again only when the stream has done what it holds by then."""

    def delay(self, rows: Tensor, gbps: float, stream: Stream) -> None:
        """Hold the stream about as long as so many bytes take at a rate in GB/s, without an SM."""

    def watch(self, started: Event, ended: Event, late: Callable[[], None]) -> None:
        """Call `late`, from a thread of its own, unless `ended` comes within the time-out of `started`."""

    def synchronize(self) -> None:
        """Return when all streams of this rank are done."""
