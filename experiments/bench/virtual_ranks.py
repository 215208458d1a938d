"""Ranks that are streams of one process: the one-sided exchange on one GPU, or on a CPU with a thread a rank.

Every rank is a `ContextParallel` with its own transport, heap and receive buffers, and puts rows into the others' as
processes do. What is missing is the handshake: one process agrees with itself. All ranks' rows leave before any rank
computes. On a GPU the backward pass works as well: the host waits for nothing, once all kernels are loaded.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor

from flashcp.comm.choice import Connection
from flashcp.comm.fabrics.base import Fabric, Region
from flashcp.comm.fabrics.memory import virtual_memories
from flashcp.comm.fabrics.shm import ShmFabric
from flashcp.comm.heap import SymmetricHeap
from flashcp.comm.one_sided import OneSided
from flashcp.context_parallel import ContextParallel
from flashcp.sharding.plan import ShardingPlan

__all__ = ["VirtualRanks", "check_connections"]

_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


class VirtualRanks:
    """exchange, overlap, stages, backward, attention, timeout_s: as for `flashcp.ContextParallel`.

    throttle_gbps: GB/s at which each rank's rows leave, 0 for no limit.

    Raises ValueError where streams of several ranks would share a hardware queue of the GPU (`check_connections`).
    """

    def __init__(
        self,
        world_size: int,
        device: torch.device,
        exchange: str = "exact",
        overlap: str = "staged",
        attention: str = "auto",
        backward: str = "keep",
        stages: int = 2,
        throttle_gbps: float = 0.0,
        timeout_s: float = 20.0,
    ) -> None:
        self.device = device
        self._retired: list[Region] = []
        self._oldest = 0
        self._loaded: set[tuple[object, ...]] = set()
        if device.type == "cuda":
            check_connections(world_size, os.environ)
            self.streams = [torch.cuda.Stream(device) for _ in range(world_size)]
            fabrics = _on_gpu(world_size, device, self._retired, timeout_s, throttle_gbps)
        else:
            self.streams = []
            arrays = virtual_memories(world_size, lambda size: np.zeros(size, dtype=np.uint8))
            fabrics = [ShmFabric(rank, world_size, arrays, timeout_s, throttle_gbps) for rank in range(world_size)]
        self._fabrics = fabrics
        self._transports = [
            OneSided(fabric, SymmetricHeap(fabric, lambda: self._oldest, lambda: None)) for fabric in fabrics
        ]
        self.ranks = [
            ContextParallel(
                Connection(transport, None, "ranks of one process"), exchange, overlap, attention, backward=backward,
                stages=stages,
            )
            for transport in self._transports
        ]  # fmt: skip

    @property
    def regions(self) -> int:
        """Receive buffers that the first rank holds; the others hold as many."""
        return len(self._transports[0].heap.regions)

    def forward(
        self,
        plan: ShardingPlan,
        q: Sequence[Tensor],
        k: Sequence[Tensor],
        v: Sequence[Tensor],
        softmax_scale: float | None = None,
        attending: Collection[int] | None = None,
    ) -> list[Tensor]:
        """Attention of every rank's rows; q, k, v: one tensor a rank. Where gradients are on, regions are kept for the
        backward pass, as `ContextParallel` keeps them.

        attending: the ranks that compute, None for all; the others only send, as if they computed on GPUs of their own.
        """
        if self.device.type == "cuda":
            self._load_kernels(plan, q, k, v)
        return self._forward(plan, q, k, v, softmax_scale, attending)

    def _forward(
        self,
        plan: ShardingPlan,
        q: Sequence[Tensor],
        k: Sequence[Tensor],
        v: Sequence[Tensor],
        softmax_scale: float | None = None,
        attending: Collection[int] | None = None,
    ) -> list[Tensor]:
        if self._retired:
            self.synchronize()
            self._retired.clear()
        # What headers tell between processes: once a call, so that all ranks choose the same regions.
        self._oldest = min(transport.oldest for transport in self._transports)
        handles, outs = [], []
        for rank, cp in enumerate(self.ranks):
            with self._stream(rank):
                handles.append(cp.prefetch(k[rank], v[rank], plan))
        for rank, handle in enumerate(handles):
            if attending is not None and rank not in attending:
                continue
            with self._stream(rank):
                outs.append(handle.attention(q[rank], softmax_scale))
        for stream in self.streams:
            torch.cuda.current_stream(self.device).wait_stream(stream)
        return outs

    def synchronize(self) -> None:
        """Return when all ranks are done. Raises ExchangeError as `ContextParallel.synchronize` does."""
        for rank, cp in enumerate(self.ranks):
            with self._stream(rank):
                cp.synchronize()

    def _load_kernels(self, plan: ShardingPlan, q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor]) -> None:
        """Run both passes once on such rows with nobody waiting for anybody; their results mean nothing.

        The first launch of a kernel waits until the GPU has done all it holds, and in a backward pass that may be a
        rank's wait for rows which this same thread would queue next.
        """
        key = plan.fingerprint, q[0].shape[1:], k[0].shape[1:], q[0].dtype
        if key in self._loaded:
            return
        self._loaded.add(key)
        with torch.enable_grad(), self._nobody_waits():
            leaves = [[x.detach().clone().requires_grad_() for x in each] for each in (q, k, v)]
            queries, keys, values = leaves
            outs = self._forward(plan, queries, keys, values)
            torch.autograd.grad(outs, [x for each in leaves for x in each], [torch.zeros_like(out) for out in outs])
            torch.cuda.synchronize(self.device)

    @contextmanager
    def _nobody_waits(self) -> Iterator[None]:
        for fabric in self._fabrics:
            fabric.waiting = False  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for fabric in self._fabrics:
                fabric.waiting = True  # type: ignore[attr-defined]

    def _stream(self, rank: int) -> AbstractContextManager[object]:
        """What is launched inside waits for what this process launched before."""
        if not self.streams:
            return nullcontext()
        self.streams[rank].wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.streams[rank])


def check_connections(ranks: int, environment: Mapping[str, str]) -> None:
    """Raise ValueError where a GPU has fewer hardware queues than ranks of one process have streams.

    Streams that share a queue wait for each other: a rank's wait for rows could stand before the put that it waits for.
    """
    streams = ranks * (ranks + 1) + 1  # each rank's puts to every rank, its own work, and the process's
    queues = int(environment.get(_CONNECTIONS, "8"))
    if streams > queues:
        raise ValueError(
            f"{ranks} ranks in one process use {streams} streams and {_CONNECTIONS}={queues} queues: expected no more "
            f"streams than queues; set {_CONNECTIONS}=32, the most there are, before Python starts"
        )


def _on_gpu(
    world_size: int, device: torch.device, retired: list[Region], timeout_s: float, throttle_gbps: float
) -> list[Fabric]:
    """retired: where regions wait until the GPU has done with them."""
    from flashcp.comm.fabrics.cuda import CudaFabric
    from flashcp.comm.fabrics.cuda_device import CudaDevice

    def make(size: int) -> tuple[Tensor, torch.cuda.Event]:
        return torch.zeros(size, dtype=torch.uint8, device=device), torch.cuda.current_stream(device).record_event()

    made = virtual_memories(world_size, make)

    def memories(index: int, size: int) -> tuple[Sequence[Tensor], object]:
        tensors, zeroed = zip(*made(index, size), strict=True)
        for event in zeroed:  # by another rank's stream, perhaps, and flags are raised by this one
            torch.cuda.current_stream(device).wait_event(event)
        return tensors, None

    def fabric(rank: int) -> Fabric:
        own = CudaDevice(device, timeout_s)
        return CudaFabric("virtual", rank, world_size, own, memories, retired.append, timeout_s, throttle_gbps)

    return [fabric(rank) for rank in range(world_size)]
