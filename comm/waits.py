"""How a rank waits for operations of torch.distributed: the host itself, or the stream that needs the rows.

On a GPU the host should run ahead of the device, so a wait there is an order to the current stream. Nobody then looks
at a clock but the watchdog: what it finds is raised at this rank's next call, and by `synchronize`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from flashcp.comm.errors import NEW_GROUP, ExchangeError, ExchangeTimeoutError
from flashcp.comm.watchdog import Watchdog

_LOOK_S = 2e-4  # between two looks at an event that the host waits for


class HostWaits:
    """Waits of one rank: the host waits, and passes the time-out on. An error that was noted raises at every later
    call."""

    def __init__(self, rank: int, timeout_s: float) -> None:
        self.rank, self.timeout_s = rank, timeout_s
        self._error: ExchangeError | None = None

    def home(self, device: torch.device) -> torch.cuda.Stream | None:
        """The stream whose order decides when memory that is allocated now may be used again; None on a CPU."""
        return torch.cuda.current_stream(device) if device.type == "cuda" else None

    def note(self, error: ExchangeError) -> None:
        """What nobody was there to be told of; the first one stays."""
        self._error = self._error or error

    def check(self) -> None:
        """Raise what was noted."""
        if self._error is not None:
            raise self._error

    def wait(self, works: Sequence[Any], what: str, home: torch.cuda.Stream | None) -> None:
        """Return when the works are done, or when the current stream does nothing more before they are.

        what: they are, and whose. home: of the memory that the works read and write, see `home`. Raises
        ExchangeTimeoutError, ExchangeError.
        """
        with bounded(self.timeout_s, self.rank, what) as limit:
            for work in works:
                work.wait(limit)

    def synchronize(self) -> None:
        """Return when all that was waited for so far has come. Raises what went wrong."""
        self.check()

    def close(self) -> None:
        """End the thread that looks at the clock, where there is one."""


class StreamWaits(HostWaits):
    """The current stream waits, within the time-out of a watchdog: for NCCL (run in a group of one rank) and NVSHMEM.

    NCCL's `Work.wait()` makes the current stream wait and lets go of the tensors that it held for the operation. With
    a time-out it also keeps the host until the operation has ended, and takes the communicators down past it
    (`ProcessGroupNCCL::WorkNCCL::wait`, torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp). So none is given.

    A CUDA graph keeps the order of streams, but its events cannot be queried: under capture nothing is watched.
    """

    def __init__(self, rank: int, timeout_s: float) -> None:
        super().__init__(rank, timeout_s)
        self._watchdog = Watchdog(timeout_s)
        self._awaited: deque[torch.cuda.Event] = deque()  # by streams, in the order in which this rank asked

    def wait(self, works: Sequence[Any], what: str, home: torch.cuda.Stream | None) -> None:
        """works: with a `wait()` that orders the current stream. Raises what was noted before."""
        started = self._mark(home)
        for work in works:
            work.wait()
        if home is not None and home != (current := torch.cuda.current_stream(home.device)):
            home.wait_stream(current)  # its next user of this memory comes behind the works, too
        ended = self._mark(home)
        if ended is not None:
            self._has_come()
            self._awaited.append(ended)
            said = f"rank {self.rank} waited {self.timeout_s:g} s for {what}, on its GPU"
            self._watchdog.watch(started, ended, partial(self.note, ExchangeTimeoutError(said)))
        self.check()

    def synchronize(self) -> None:
        while not self._has_come():
            self.check()
            time.sleep(_LOOK_S)
        self.check()

    def close(self) -> None:
        self._watchdog.close()

    def _has_come(self) -> bool:
        """Whether all has come that streams wait for; forgets what has. A transfer that is thrown away comes here from
        any thread, and in between."""
        for event in list(self._awaited):
            if not event.query():
                return False
            with suppress(ValueError):
                self._awaited.remove(event)
        return True

    def _mark(self, home: torch.cuda.Stream | None) -> torch.cuda.Event | None:
        """An event in the current stream; None where there is no stream, or one that is captured."""
        if home is None or torch.cuda.is_current_stream_capturing():
            return None
        return torch.cuda.current_stream(home.device).record_event()


@contextmanager
def bounded(timeout_s: float, rank: int, what: str) -> Iterator[timedelta]:
    """For operations that must end: gives the time-out to wait with, and turns torch's errors into ours.

    Raises ExchangeTimeoutError past the time-out, ExchangeError when a peer is gone or the group was ended before.
    """
    try:
        yield timedelta(seconds=max(timeout_s, 0.001))
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        if "timed out" in text.lower():
            raise ExchangeTimeoutError(f"rank {rank} waited {timeout_s:g} s for {what}", ends_group=True) from error
        while_ = f"while waiting for {what}"
        if "timeout caused" in text.lower():
            why = f"cannot go on {while_}: a time-out ended this process group before; {NEW_GROUP}"
        elif "connection" in text.lower() or "pair" in text.lower():
            why = f"lost the connection {while_}: a rank ended, or a time-out ended this process group; {NEW_GROUP}"
        else:
            why = f"failed {while_}: {text}"
        raise ExchangeError(f"rank {rank} {why}", ends_group=True) from error
