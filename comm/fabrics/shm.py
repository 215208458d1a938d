"""Shared memory between the processes of one host: a thread of each rank puts rows while the rank computes.

Flags rely on stores being seen in order: x86 keeps it, elsewhere the locks that Python takes between two calls of
torch do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcp.comm.clock import span
from flashcp.comm.errors import ExchangeError, ExchangeTimeoutError
from flashcp.comm.fabrics.base import NO_PUT, Put, Region, Ticking
from flashcp.kernels.interface import WaitFlags

__all__ = ["ShmFabric"]

Memories = Callable[[int, int], list[np.ndarray]]
_PAGE = 4096
_CHUNK_BYTES = 1 << 18  # a throttled put pauses in between
_IDLE_S = 10.0  # a thread without errands ends
_SPIN_S = 5e-5  # between two looks at a flag: ranks share cores


@dataclass(frozen=True, eq=False)
class ShmRegion(Region):
    """memories: of every rank, as this process sees them."""

    memories: list[np.ndarray]

    @cached_property
    def flags(self) -> list[np.ndarray]:
        """Of every rank, int32 [2, N]: arrived, freed."""
        ranks = len(self.memories)
        return [memory[: 8 * ranks].view(np.int32).reshape(2, ranks) for memory in self.memories]

    @cached_property
    def data(self) -> list[np.ndarray]:
        """Of every rank, bytes."""
        head = _head_bytes(len(self.memories))
        return [memory[head : head + self.data_bytes] for memory in self.memories]


class ShmFabric:
    """memories(index, size): that many zero bytes of every rank, as this process sees them (`shared_memories`).

    throttle_gbps: GB/s at which rows leave; 0: at once.
    """

    name = "shm"

    def __init__(
        self, rank: int, world_size: int, memories: Memories, timeout_s: float, throttle_gbps: float = 0.0
    ) -> None:
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self._memories = memories
        self._courier = _Courier(rank, timeout_s, throttle_gbps)
        self._stuck = torch.zeros(1, dtype=torch.int32)

    @property
    def sent_bytes(self) -> int:
        """What was put into other ranks' memory so far."""
        return self._courier.sent_bytes

    @property
    def oldest_put(self) -> int:
        """See Fabric."""
        return self._courier.oldest_put

    def allocate(self, index: int, data_bytes: int) -> Region:
        """See Fabric."""
        return ShmRegion(index, data_bytes, self._memories(index, _head_bytes(self.world_size) + data_bytes))

    def retire(self, region: Region) -> None:
        """See Fabric. Each process has mapped it for itself."""

    def tensor(self, region: Region, rows: int, row: Sequence[int], dtype: torch.dtype, token: object) -> Tensor:
        """See Fabric."""
        assert isinstance(region, ShmRegion)
        memory = region.data[self.rank].view(_Held)
        memory.token = token
        return _view(memory, 0, rows, tuple(row), dtype)

    def put(self, puts: Sequence[Put]) -> Ticking:
        """See Fabric."""
        return self._courier.start(puts)

    def wait(self, region: Region, source: int, epoch: int) -> None:
        """See Fabric."""
        assert isinstance(region, ShmRegion)
        flag = region.flags[self.rank][0]
        deadline = time.monotonic() + self.timeout_s
        while flag[source] < epoch:
            if time.monotonic() > deadline:
                raise _late(self.rank, self.timeout_s, source, epoch)
            self._courier.check()
            time.sleep(_SPIN_S)

    def free(self, region: Region, epoch: int) -> None:
        """See Fabric."""
        assert isinstance(region, ShmRegion)
        for flags in region.flags:
            flags[1, self.rank] = epoch

    def flags(self, region: Region, epoch: int) -> WaitFlags | None:
        """See Fabric."""
        assert isinstance(region, ShmRegion)
        self._stuck.zero_()
        return WaitFlags(torch.from_numpy(region.flags[self.rank][0]), epoch, self._stuck, self.timeout_s)

    def check(self, flags: WaitFlags) -> None:
        """See Fabric."""
        if source := int(flags.stuck):
            raise _late(self.rank, self.timeout_s, source - 1, flags.epoch)

    def synchronize(self) -> None:
        """See Fabric."""
        self._courier.finish()


@dataclass
class _Errand:
    """Some puts that were asked for together."""

    puts: list[Put]
    done: threading.Event = field(default_factory=threading.Event)
    courier: _Courier | None = None

    def leave(self) -> None:
        assert self.courier is not None
        deadline = time.monotonic() + self.courier.timeout_s
        while not self.done.wait(0.05):
            self.courier.check()
            if time.monotonic() > deadline:
                rank, timeout_s = self.courier.rank, self.courier.timeout_s
                raise ExchangeTimeoutError(f"rank {rank} waited {timeout_s:g} s for its own rows to leave")
        self.courier.check()


class _Courier:
    """The thread that puts rows, those first whose place is free."""

    def __init__(self, rank: int, timeout_s: float, throttle_gbps: float) -> None:
        self.rank, self.timeout_s, self.throttle_gbps = rank, timeout_s, throttle_gbps
        self.sent_bytes = 0
        self._due = 0.0  # when the throttled link is free again
        self._error: ExchangeError | None = None
        self._errands: list[_Errand] = []
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None

    def start(self, puts: Sequence[Put]) -> Ticking:
        self.check()
        errand = _Errand(list(puts), courier=self)
        with self._news:
            self._errands.append(errand)
            self._news.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="flashcp-courier", daemon=True)
                self._thread.start()
        return errand

    @property
    def oldest_put(self) -> int:
        """The least epoch of the puts that are not done."""
        with self._news:
            return min((put.epoch for errand in self._errands for put in errand.puts), default=NO_PUT)

    def finish(self) -> None:
        """Return when all errands are done. Raises what went wrong on the way."""
        with self._news:
            errands = list(self._errands)
        for errand in errands:
            errand.leave()
        self.check()

    def check(self) -> None:
        """Raise what went wrong on the way."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        with torch.no_grad():
            while True:
                with self._news:
                    while not self._errands:
                        if not self._news.wait(_IDLE_S) and not self._errands:
                            self._thread = None  # the next errand starts another: operators come and go
                            return
                try:
                    self._serve()
                except Exception as error:  # told to the rank at its next wait: a thread has nobody to raise to
                    failed = ExchangeError(f"rank {self.rank} could not put its rows: {error}")
                    self._error = error if isinstance(error, ExchangeError) else failed
                    return

    def _serve(self) -> None:
        """One put, or a moment's sleep where no place is free."""
        since = time.monotonic()
        while True:
            for errand in list(self._errands):
                ready = next((put for put in errand.puts if self._is_free(put)), None)
                if ready is not None:
                    self._carry(ready)
                    with self._news:
                        errand.puts.remove(ready)
                if not errand.puts:
                    errand.done.set()
                    with self._news:
                        self._errands.remove(errand)
                if ready is not None or not errand.puts:
                    return
            if time.monotonic() - since > self.timeout_s:
                put = self._errands[0].puts[0]
                raise ExchangeTimeoutError(
                    f"rank {self.rank} waited {self.timeout_s:g} s for rank {put.to} to free its receive buffer "
                    f"(epoch {put.after})"
                )
            time.sleep(_SPIN_S)

    def _is_free(self, put: Put) -> bool:
        assert isinstance(put.region, ShmRegion)
        return bool(put.region.flags[self.rank][1, put.to] >= put.after)

    def _carry(self, put: Put) -> None:
        region = put.region
        assert isinstance(region, ShmRegion)
        rows = put.stop - put.start
        if rows:
            into = _view(region.data[put.to], put.offset, rows, put.row, put.dtype)
            with span(f"send {put.leaving.what} to rank {put.to}"):
                self._copy(put, into)
        region.flags[put.to][0, self.rank] = put.epoch

    def _copy(self, put: Put, into: Tensor) -> None:
        rows, leaves = len(into), put.to != self.rank
        slow = leaves and self.throttle_gbps > 0
        step = max(1, rows * _CHUNK_BYTES // max(1, into.nbytes)) if slow else rows
        for start in range(0, rows, step):
            part = into[start : start + step]
            put.leaving.write(part, put.start + start, put.start + start + len(part))
            self.sent_bytes += part.nbytes * leaves
            if slow:
                self._due = max(self._due, time.perf_counter()) + part.nbytes / self.throttle_gbps / 1e9
                time.sleep(max(0.0, self._due - time.perf_counter()))


class _Held(np.ndarray):
    """An array that holds a token, and hands it on to its parts."""

    token: object = None

    def __array_finalize__(self, whole: Any) -> None:
        self.token = getattr(whole, "token", None)


def _view(memory: np.ndarray, offset: int, rows: int, row: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """[rows, *row] of a dtype, from a byte offset on."""
    size = rows * int(np.prod(row, dtype=np.int64)) * dtype.itemsize
    return torch.from_numpy(memory[offset : offset + size]).view(dtype).view(rows, *row)


def _head_bytes(ranks: int) -> int:
    return -(-8 * ranks // _PAGE) * _PAGE


def _late(rank: int, timeout_s: float, source: int, epoch: int) -> ExchangeTimeoutError:
    return ExchangeTimeoutError(f"rank {rank} waited {timeout_s:g} s for the rows of rank {source} (epoch {epoch})")
