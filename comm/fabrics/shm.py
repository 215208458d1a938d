"""Shared memory between the processes of one host: a thread of each rank puts rows while the rank computes.

Flags rely on stores being seen in order: x86 keeps it, elsewhere the locks that Python takes between two calls of
torch do.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from flashcp.comm.clock import span
from flashcp.comm.ending import ends_before_python
from flashcp.comm.errors import ExchangeError
from flashcp.comm.fabrics.base import ARRIVED, FREED, NO_PUT, Fabric, Put, Region, head_bytes
from flashcp.kernels.interface import WaitFlags

PUTS = "flashcp-puts"
"""The name of the thread that puts rows."""
_CHUNK_BYTES = 1 << 18  # a throttled put pauses in between
_IDLE_S = 10.0  # a thread without puts ends
_LEFT_S = 0.05  # between two looks for an error of the thread
_SPIN_S = 5e-5  # between two looks at a flag: ranks share cores


class ShmFabric(Fabric):
    """memories(index, size): that many zero bytes of every rank, as this process sees them (`shared_memories`).

    One thread puts rows, those first whose place is free. What goes wrong there is raised by this rank's next call.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        memories: Callable[[int, int], list[np.ndarray]],
        timeout_s: float,
        throttle_gbps: float = 0.0,
    ) -> None:
        super().__init__("shm", rank, world_size, timeout_s, throttle_gbps)
        self._memories = memories
        self._stuck = torch.zeros(1, dtype=torch.int32)
        self._link_free_at = 0.0  # of the throttled link
        self._error: ExchangeError | None = None
        self._pending: dict[threading.Event, list[Put]] = {}  # puts that were asked for together, until all have landed
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None
        ends_before_python(self)

    @property
    def oldest_put(self) -> int:
        with self._news:
            return min((put.epoch for puts in self._pending.values() for put in puts), default=NO_PUT)

    def allocate(self, index: int, data_bytes: int) -> Region:
        memories = self._memories(index, head_bytes(self.world_size) + data_bytes)
        return Region(index, data_bytes, [torch.from_numpy(memory) for memory in memories])

    def retire(self, region: Region) -> None:
        """Each process has mapped it for itself."""

    def tensor(self, region: Region, rows: int, row: Sequence[int], dtype: torch.dtype, token: object) -> Tensor:
        if not rows * math.prod(row):
            return torch.empty((rows, *row), dtype=dtype)
        # A new array over the same memory ends with the last tensor that is made from it, and the token with the array.
        memory = region.data(self.rank, 0, rows * math.prod(row) * dtype.itemsize).numpy()
        weakref.finalize(memory, lambda held: None, token).atexit = False
        return torch.from_numpy(memory).view(dtype).view(rows, *row)

    def put(self, puts: Sequence[Put]) -> Callable[[], None]:
        self._raise_error()
        landed = threading.Event()
        with self._news:
            self._pending[landed] = list(puts)
            self._news.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=PUTS, daemon=True)
                self._thread.start()
        return partial(self._await_landed, landed)

    def wait(self, region: Region, source: int, epoch: int) -> None:
        arrived = region.flags[self.rank][ARRIVED].numpy()
        deadline = time.monotonic() + self.timeout_s
        while arrived[source] < epoch:
            if time.monotonic() > deadline:
                raise self.timed_out(f"the rows of rank {self.names[source]} (epoch {epoch})")
            self._raise_error()
            time.sleep(_SPIN_S)

    def free(self, region: Region, epoch: int) -> None:
        for flags in region.flags:
            flags.numpy()[FREED, self.rank] = epoch

    def flags(self, region: Region, epoch: int) -> WaitFlags:
        self._stuck.zero_()
        return WaitFlags(region.flags[self.rank][ARRIVED], epoch, self._stuck, self.timeout_s)

    def check(self, flags: WaitFlags) -> None:
        if source := int(flags.stuck):  # one more than the rank: 0 says that no wait gave up
            raise self.timed_out(f"the rows of rank {self.names[source - 1]} (epoch {flags.epoch})")

    def synchronize(self) -> None:
        with self._news:
            pending = list(self._pending)
        for landed in pending:
            self._await_landed(landed)
        self._raise_error()

    def close(self) -> None:
        with self._news:
            thread, self._thread = self._thread, None
            self._news.notify()
        if thread is not None:
            thread.join(self.timeout_s)  # it ends behind the put that it is at

    def _await_landed(self, landed: threading.Event) -> None:
        deadline = time.monotonic() + self.timeout_s
        while not landed.wait(_LEFT_S):
            self._raise_error()
            if time.monotonic() > deadline:
                raise self.timed_out("its own rows to leave")
        self._raise_error()

    def _raise_error(self) -> None:
        """Raise what went wrong in the thread."""
        if self._error is not None:
            raise self._error

    # What the thread does.

    def _run(self) -> None:
        with torch.no_grad():
            while self._has_puts():
                try:
                    self._serve()
                except Exception as error:  # told to the rank at its next wait: a thread has nobody to raise to
                    failed = ExchangeError(f"rank {self.names[self.rank]} could not put its rows: {error}")
                    self._error = error if isinstance(error, ExchangeError) else failed
                    return

    def _has_puts(self) -> bool:
        """Wait for some; False when this thread is to end."""
        with self._news:
            if not self._news.wait_for(lambda: self._pending or self._is_over(), _IDLE_S):
                self._thread = None  # the next put starts another: operators come and go
            return not self._is_over()

    def _is_over(self) -> bool:
        """Whether this thread was told to end."""
        return self._thread is not threading.current_thread()

    def _serve(self) -> None:
        """One put, or a moment's sleep where no place is free."""
        since = time.monotonic()
        while True:
            with self._news:
                pending = list(self._pending.items())
            for landed, puts in pending:
                ready = next((place for place, put in enumerate(puts) if self._is_free(put)), None)
                if ready is not None:
                    self._carry(puts[ready])
                    with self._news:
                        del puts[ready]  # by its place: tensors would be compared otherwise
                if not puts:
                    landed.set()
                    with self._news:
                        del self._pending[landed]
                if ready is not None or not puts:
                    return
            if self._is_over():
                return
            if time.monotonic() - since > self.timeout_s:
                put = pending[0][1][0]
                raise self.timed_out(f"rank {self.names[put.to]} to free its receive buffer (epoch {put.after})")
            time.sleep(_SPIN_S)

    def _is_free(self, put: Put) -> bool:
        return bool(put.region.flags[self.rank].numpy()[FREED, put.to] >= put.after)

    def _carry(self, put: Put) -> None:
        rows, size = put.stop - put.start, (put.stop - put.start) * math.prod(put.row) * put.dtype.itemsize
        if rows:
            into = put.region.data(put.to, put.offset, size).view(put.dtype).view(rows, *put.row)
            with span(f"send {put.outgoing.what} to rank {self.names[put.to]}"):
                self._copy(put, into)
        put.region.flags[put.to].numpy()[ARRIVED, self.rank] = put.epoch

    def _copy(self, put: Put, into: Tensor) -> None:
        rows, leaves = len(into), put.to != self.rank
        slow = leaves and self.throttle_gbps > 0
        step = max(1, rows * _CHUNK_BYTES // max(1, into.nbytes)) if slow else rows
        for start in range(0, rows, step):
            part = into[start : start + step]
            put.outgoing.write(part, put.start + start, put.start + start + len(part))
            self.sent_bytes += part.nbytes * leaves
            if slow:
                now = time.perf_counter()
                self._link_free_at = max(self._link_free_at, now) + part.nbytes / self.throttle_gbps / 1e9
                time.sleep(max(0.0, self._link_free_at - time.perf_counter()))
