"""An emulated device: memory that is poisoned when it dies, streams, copies, flags, and torch's operators as kernels.

Under `EmulatedDevice.launching()` every operator of torch that touches this device's memory is queued on its current
stream, as on a GPU: its results are NaN until it has run. Work holds addresses, not tensors, so memory may die while
work that wants it is still in a queue; such work raises FaultError when it runs.
"""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tests.emulation.hosts import Host
from tests.emulation.world import Event, Stream, Wait, Work, World, after_all, all_of

__all__ = ["EmulatedDevice", "FaultError"]

_POISON = 0xFF  # NaN in every floating-point dtype, -1 in an integer one
_SYNCHRONOUS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero"}


class FaultError(AssertionError):
    """Work touched memory that is not there any more."""


class _Bytes(np.ndarray):
    """Bytes whose end is noticed: views of it and tensors over it keep it alive. keeps: what lives as long."""

    keeps: object = None


class Block:
    """One allocation. Its bytes stay where they are for ever, so that what goes wrong is seen and not suffered."""

    def __init__(self, size: int, name: str) -> None:
        self.bytes = np.full(max(size, 1), _POISON, dtype=np.uint8)
        self.name, self.alive = name, True
        self.start = self.bytes.ctypes.data


class Memory:
    """All allocations of all devices, by address."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._blocks: dict[int, Block] = {}

    def new(self, size: int, name: str) -> Block:
        """Poisoned bytes."""
        block = Block(size, name)
        self._starts.insert(bisect_right(self._starts, block.start), block.start)
        self._blocks[block.start] = block
        return block

    def free(self, block: Block) -> None:
        """From now on whoever touches it faults."""
        block.bytes.fill(_POISON)
        block.alive = False

    def find(self, address: int) -> Block | None:
        """The block that an address lies in."""
        place = bisect_right(self._starts, address) - 1
        if place < 0:
            return None
        block = self._blocks[self._starts[place]]
        return block if address < block.start + len(block.bytes) else None


class _Address:
    """Where a tensor lies, without keeping its memory. `tensor` is it again, if the memory is still there."""

    def __init__(self, tensor: Tensor, block: Block) -> None:
        self.block = block
        self.offset = tensor.untyped_storage().data_ptr() - block.start
        self.geometry = tensor.size(), tensor.stride(), tensor.storage_offset()
        self.dtype, self.size = tensor.dtype, tensor.untyped_storage().nbytes()

    def tensor(self, what: str) -> Tensor:
        if not self.block.alive:
            raise FaultError(f"{what} touches {self.block.name}, which was freed")
        return (
            torch.from_numpy(self.block.bytes[self.offset : self.offset + self.size])
            .view(self.dtype)
            .as_strided(*self.geometry)
        )


class EmulatedDevice:
    """One rank's device, as `flashcp.comm.fabrics.cuda_device.CudaDevice`.

    sms: programs that can be there at a time. queues: how many FIFO queues streams share, 0 for one each.
    """

    def __init__(self, world: World, memory: Memory, rank: int, host: Host, sms: int = 4, queues: int = 0) -> None:
        self.world, self.memory, self.rank, self.host, self.queues = world, memory, rank, host, queues
        self.sms = sms
        self.name = f"rank {rank}"
        self._device = world.add_device(self.name, sms)
        self._current = self.new_stream("compute")
        self._kept: dict[int, list[Stream]] = {}
        self.capturing = False

    def new_stream(self, name: str) -> Stream:
        streams = self._device.streams
        if self.queues and len(streams) >= self.queues:
            return streams[len(streams) % self.queues]
        streams.append(Stream(name))
        return streams[-1]

    def current_stream(self) -> Stream:
        return self._current

    def is_capturing(self) -> bool:
        return self.capturing

    def new(self, size: int, name: str) -> Tensor:
        """Poisoned bytes; they are freed, in stream order, when nothing on the host refers to them any more."""
        return self._owning(self.memory.new(size, f"{name} of {self.name}"))

    def empty(self, shape: Sequence[int], dtype: torch.dtype, name: str) -> Tensor:
        """A poisoned tensor; one without elements lies on the device, too."""
        count = int(np.prod(tuple(shape)))
        return self.new(max(count * dtype.itemsize, 16), name).view(dtype)[:count].view(tuple(shape))

    def new_mapped(self, size: int, name: str) -> Tensor:
        """Poisoned bytes that are gone at once when the host drops them, whatever streams still do with them."""
        block = self.memory.new(size, f"{name} of {self.name}")
        held = block.bytes.view(_Bytes)
        weakref.finalize(held, self.memory.free, block).atexit = False
        return torch.from_numpy(held)

    def zeros(self, size: int) -> Tensor:
        memory = self.new(size, "zeros")
        self.queue(self._current, Work("clear", _on(memory, self, "clear", lambda x: x.zero_()), sms=1))
        return memory

    def upload(self, x: Tensor) -> Tensor:
        """A copy of a host's tensor."""
        source = x.clone()
        there = self.empty(x.shape, x.dtype, "input")
        self.queue(self._current, Work("upload", _on(there, self, "upload", lambda y: y.copy_(source))))
        return there

    def download(self, x: Tensor) -> Tensor:
        """A copy for the host, which waits for it."""
        self.synchronize()
        return x.detach().clone()

    def wrap(self, memory: Tensor, token: object) -> Tensor:
        found = self.memory.find(memory.data_ptr())
        assert found is not None
        offset = memory.data_ptr() - found.start
        held = found.bytes[offset : offset + memory.nbytes].view(_Bytes)
        held.keeps = (memory, token)
        return torch.from_numpy(held)

    def copy(self, into: Tensor, source: Tensor, stream: Stream) -> None:
        if source.numel():
            pair = [self.address(into), self.address(source)]

            def run() -> None:
                there, here = (x.tensor(f"{self.name}, {stream.name}: a copy") for x in pair)
                there.copy_(here)

            self.queue(stream, Work("copy", run))

    def wait_value(self, word: Tensor, value: int, stream: Stream) -> None:
        address = self.address(word)
        what = f"{address.block.name}, flag {word.storage_offset()} >= {value}"

        def there() -> bool:
            return int(address.tensor(f"{self.name}, {stream.name}: a wait")[0]) >= value

        self.queue(stream, Work("wait", lambda: None, ready=(there, what)))

    def write_value(self, word: Tensor, value: int, stream: Stream) -> None:
        address = self.address(word)
        self.queue(stream, Work("write", lambda: _fill(address.tensor(f"{self.name}, {stream.name}: a write"), value)))

    def record(self, stream: Stream) -> Event:
        return Event(stream, stream.put)

    def wait_event(self, stream: Stream, event: Event) -> None:
        self.queue(stream, Work("wait", lambda: None, ready=(event.query, f"{event.stream.name}, entry {event.place}")))

    def keep(self, memory: Tensor, stream: Stream) -> None:
        found = self.memory.find(memory.data_ptr())
        if found is not None:
            self._kept.setdefault(found.start, []).append(stream)

    def delay(self, rows: Tensor, gbps: float, stream: Stream) -> None:
        """Order is all there is here, and delays are drawn anyway."""

    def watch(self, started: Event, ended: Event, late: Callable[[], None]) -> None:
        self.world.watches.append((started, ended, late))

    def synchronize(self) -> None:
        self.host.wait(all_of(self._device.streams), f"the streams of {self.name}")

    def queue(self, stream: Stream, work: Work) -> None:
        """Put work on a stream; the host may have to wait its turn behind it."""
        stream.append(work)
        if threading.current_thread().name == self.host.name:  # a watchdog has no turn to give
            self.host.give_way()

    def kernel(
        self,
        what: str,
        run: Callable[..., Generator[Wait, bool, None] | None],
        tensors: Sequence[Tensor],
        sms: int = 1,
        stream: Stream | None = None,
        slow: bool = False,
    ) -> None:
        """Queue a kernel that is called with these tensors when it runs. slow: it ends when nothing else can happen."""
        stream = stream or self._current
        places = [self.address(x) if self.holds(x) else x for x in tensors]
        words = f"{self.name}, {stream.name}: {what}"

        def go() -> Generator[Wait, bool, None] | None:
            return run(*(x.tensor(words) if isinstance(x, _Address) else x for x in places))

        self.queue(stream, Work(what, go, sms=sms, slow=slow))

    def holds(self, x: Tensor) -> bool:
        """Whether a tensor lies in a device's memory."""
        return x.untyped_storage().nbytes() > 0 and self.memory.find(x.untyped_storage().data_ptr()) is not None

    def address(self, x: Tensor) -> _Address:
        """Where it lies."""
        block = self.memory.find(x.untyped_storage().data_ptr())
        assert block is not None, "this tensor lies on the host"
        return _Address(x, block)

    @contextmanager
    def launching(self) -> Iterator[None]:
        """Operators of torch on this device's memory are queued, in this thread."""
        with _Launches(self):
            yield

    def _owning(self, block: Block) -> Tensor:
        held = block.bytes.view(_Bytes)
        weakref.finalize(held, self._died, block, self._current).atexit = False
        return torch.from_numpy(held)

    def _died(self, block: Block, stream: Stream) -> None:
        """Nobody on the host has it any more: it may be used for something else once these streams have come so far."""
        events = [self.record(each) for each in (stream, *self._kept.pop(block.start, ()))]
        after_all(events, lambda: self.memory.free(block))


def _on(memory: Tensor, device: EmulatedDevice, what: str, run: Callable[[Tensor], object]) -> Callable[[], None]:
    address = device.address(memory)
    return lambda: _nothing(run(address.tensor(f"{device.name}: {what}")))


def _nothing(_: object) -> None:
    """Kernels return nothing."""


def _fill(word: Tensor, value: int) -> None:
    word.fill_(value)


class _Launches(TorchDispatchMode):
    def __init__(self, device: EmulatedDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device, kwargs = self.device, kwargs or {}
        if func.namespace == "flashcp":  # runs on the host; what it launches are operators of its own
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        flat, form = tree_flatten((args, kwargs))
        if func.is_view or not any(isinstance(x, Tensor) and device.holds(x) for x in flat):
            return func(*args, **kwargs)
        if func._schema.name in _SYNCHRONOUS:
            device.synchronize()
            return func(*args, **kwargs)
        changed = [
            (kwargs[a.name] if a.name in kwargs else args[i])
            for i, a in enumerate(func._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]
        places = [device.address(x) if isinstance(x, Tensor) and device.holds(x) else x for x in flat]
        results = changed or self._results(func, args, kwargs)
        targets = [] if changed else [device.address(x) if device.holds(x) else x for x in tree_flatten(results)[0]]
        name, stream = func._schema.name, device.current_stream()
        words = f"{device.name}, {stream.name}: {name}"

        def run() -> None:
            again = [x.tensor(words) if isinstance(x, _Address) else x for x in places]
            given, named = tree_unflatten(again, form)
            with torch.no_grad():
                found = tree_flatten(func(*given, **named))[0]
                for target, value in zip(targets, found, strict=not changed):
                    if isinstance(target, _Address):
                        target.tensor(words).copy_(value)

        device.queue(stream, Work(name, run, sms=1))
        return results[0] if len(changed) == 1 else results

    def _results(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Memory for what an operator returns, of the shapes that it says."""

        def shape(x: Any) -> Any:
            return (
                torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x
            )

        def place(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if not x.numel():
                return self.device.empty(x.shape, x.dtype, f"a result of {func._schema.name}")
            size = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) + 1
            memory = self.device.new(size * x.dtype.itemsize, f"a result of {func._schema.name}")
            return memory.view(x.dtype).as_strided(x.shape, x.stride())

        named = {name: "meta" if name == "device" else value for name, value in tree_map(shape, kwargs).items()}
        return tree_map(place, func(*tree_map(shape, args), **named))
