"""Ranks with emulated devices: `flashcp.ContextParallel` over the CUDA fabric, whole, without a GPU."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import flashcp
from flashcp import context_parallel
from flashcp.comm.choice import Connection
from flashcp.comm.fabrics.base import Region
from flashcp.comm.fabrics.cuda import CudaFabric, symmetric_memories
from flashcp.comm.handshake import Handshake
from flashcp.comm.heap import SymmetricHeap
from flashcp.comm.one_sided import OneSided
from flashcp.comm.transport import Alone, Transport
from tests.emulation.attention import EmulatedAttention
from tests.emulation.device import EmulatedDevice, Memory
from tests.emulation.hosts import EmulatedMail, Host, Letters, run_hosts
from tests.emulation.world import World

__all__ = ["Rank", "run_emulated"]


class Rank:
    """What a program of one rank is given."""

    def __init__(self, device: EmulatedDevice, host: Host, connection: Connection) -> None:
        self.device, self.host, self.connection = device, host, connection
        self.rank = device.rank

    def operator(self, **options: Any) -> flashcp.ContextParallel:
        """A ContextParallel of this rank."""
        return flashcp.ContextParallel(self.connection, **options)


def run_emulated(
    program: Callable[[Rank], Any],
    world_size: int,
    seed: int,
    fabric: type[CudaFabric] = CudaFabric,
    memories: Callable[..., Any] = symmetric_memories,
    patient: bool = False,
    head_ranks: int = 1,
    **device_options: Any,
) -> list[Any]:
    """`program(rank)` on every rank, in an order that the seed draws -> results in rank order.

    fabric, memories: what to run instead of the real ones. patient: waits that last for ever time out; else they raise
    DeadlockError, which says who waits for what. head_ranks: of a holder.
    """
    world, memory = World(seed, patient), Memory()
    letters: dict[range, Letters] = defaultdict(Letters)
    shared: dict[Sequence[int], _Rendezvous] = {}

    def start(rank: int) -> Callable[[Host], Any]:
        def run(host: Host) -> Any:
            device = EmulatedDevice(world, memory, rank, host, **device_options)
            first, place = rank - rank % head_ranks, rank % head_ranks
            levels = [range(first, first + head_ranks), range(place, world_size, head_ranks)]
            inside, between = (EmulatedMail(host, letters[level], level.index(rank), level) for level in levels)
            handshake = Handshake(between, inside if head_ranks > 1 else None)

            def transport(mail: EmulatedMail, level: int) -> Transport:
                """level: 1 inside a holder."""

                def retire(region: Region) -> None:
                    device.synchronize()
                    mail.share(b"+")

                rendezvous = shared.setdefault(mail.names, _Rendezvous(mail.world_size))
                symmetric = EmulatedSymmetricMemory(device, rendezvous, mail.rank)
                made = memories(symmetric, None, mail.rank, device, torch.device("cpu"), mail.share)
                own = fabric("cuda_symmetric", mail.rank, mail.world_size, device, made, retire, 60.0)
                own.names = mail.names
                heap = SymmetricHeap(own, lambda: handshake.oldest[level], handshake.settle)
                return OneSided(own, heap)

            with device.launching(), _attention_of(device):
                carries = [
                    transport(mail, i) if mail.world_size > 1 else None for i, mail in enumerate((between, inside))
                ]
                result = program(
                    Rank(device, host, Connection(carries[0] or Alone(), handshake, "emulated", carries[1]))
                )
                device.synchronize()
                return result

        return run

    with patch.object(context_parallel, "select_attention", _attention_of_this_thread):
        return run_hosts(world, [start(rank) for rank in range(world_size)])


_ATTENTION: dict[str, EmulatedAttention] = {}


@contextmanager
def _attention_of(device: EmulatedDevice) -> Iterator[None]:
    """Within, attention of this thread is that of a device."""
    _ATTENTION[device.host.name] = EmulatedAttention(device)
    try:
        yield
    finally:
        del _ATTENTION[device.host.name]


def _attention_of_this_thread(*_: Any) -> EmulatedAttention:
    return _ATTENTION[threading.current_thread().name]


class _Rendezvous:
    """Allocations that ranks have brought together, in the order in which they came to it."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.brought: dict[int, dict[int, Any]] = defaultdict(dict)


class EmulatedSymmetricMemory:
    """`torch.distributed._symmetric_memory` as far as it is used.

    An allocation lives as long as the tensor that `empty` returned; the handle's buffers own nothing. As in torch's
    pool it begins somewhere in a block, elsewhere on each rank, and the handle's buffers begin where the block does.
    """

    def __init__(self, device: EmulatedDevice, shared: _Rendezvous, rank: int) -> None:
        self.device, self.shared, self.rank, self.calls = device, shared, rank, 0

    def empty(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory of this rank's."""
        begin = 512 * (self.device.rank + self.calls % 3)
        return self.device.new_mapped(begin + size, "a symmetric region")[begin:].view(dtype)

    def rendezvous(self, tensor: Tensor, group: object) -> _Handle:
        """Return when all ranks have brought theirs."""
        call, self.calls = self.calls, self.calls + 1
        brought = self.shared.brought[call]
        block = self.device.memory.find(tensor.data_ptr())
        brought[self.rank] = block
        self.device.host.wait(lambda: len(brought) == self.shared.world_size, "all ranks' symmetric memory")
        return _Handle(brought, self.rank, self.shared.world_size)


class _Handle:
    def __init__(self, blocks: dict[int, Any], rank: int, world_size: int) -> None:
        self.blocks, self.rank, self.world_size = blocks, rank, world_size

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype, storage_offset: int = 0) -> Tensor:
        (size,) = sizes
        return torch.from_numpy(self.blocks[rank].bytes[storage_offset : storage_offset + size]).view(dtype)
