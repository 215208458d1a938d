"""Ranks that are streams of one process: the one-sided exchange on one GPU, or on a CPU with a thread a rank.

Every rank has its own transport, heap and receive buffers, and puts rows into the others' as processes do. What is
missing is the handshake: one process agrees with itself. All ranks' rows leave before any rank computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashcp.comm.clock import Clock
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.comm.exchanges.base import Exchange, Job, Kept
from flashcp.comm.fabrics.base import Fabric
from flashcp.comm.fabrics.memory import virtual_memories
from flashcp.comm.fabrics.shm import ShmFabric
from flashcp.comm.heap import SymmetricHeap
from flashcp.comm.one_sided import OneSided
from flashcp.kernels.selection import select_attention
from flashcp.sharding.plan import ShardingPlan

__all__ = ["Result", "VirtualRanks"]


class Result(NamedTuple):
    """One rank's output and what its backward pass needs."""

    out: Tensor
    kept: Kept


class VirtualRanks:
    """exchange, overlap, stages, backward, attention: as for `flashcp.ContextParallel`. throttle_gbps: GB/s at which
    each rank's rows leave, 0 for no limit."""

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
        fabrics = _fabrics(world_size, device, timeout_s, throttle_gbps)
        self.device = device
        self.streams = [torch.cuda.Stream(device) for _ in range(world_size)] if device.type == "cuda" else []
        kernel = select_attention(attention, device)
        self.job = Job(kernel, overlap, stages, backward == "refetch", Clock(), lambda: None)
        self._exchanges: list[Exchange] = [
            EXCHANGE_CLASSES[exchange](OneSided(fabric, SymmetricHeap(fabric, lambda: 0, lambda: None)))
            for fabric in fabrics
        ]

    def forward(
        self, plan: ShardingPlan, q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], scale: float
    ) -> list[Result]:
        """Attention of every rank's rows, as `Exchange.forward`; q, k, v: one tensor a rank."""
        flights = []
        for rank, exchange in enumerate(self._exchanges):
            with self._stream(rank):
                flights.append(exchange.start(plan, k[rank], v[rank]))
        results = []
        for rank, exchange in enumerate(self._exchanges):
            with self._stream(rank):
                out = exchange.forward(plan, q[rank], k[rank], v[rank], flights[rank], self.job, scale)
                results.append(Result(*out))
        self._join()
        return results

    def _stream(self, rank: int) -> AbstractContextManager[object]:
        """What is launched inside waits for what this process launched before."""
        if not self.streams:
            return nullcontext()
        self.streams[rank].wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.streams[rank])

    def _join(self) -> None:
        for stream in self.streams:
            torch.cuda.current_stream(self.device).wait_stream(stream)


def _fabrics(world_size: int, device: torch.device, timeout_s: float, throttle_gbps: float) -> list[Fabric]:
    if device.type == "cpu":
        arrays = virtual_memories(world_size, lambda size: np.zeros(size, dtype=np.uint8))
        return [ShmFabric(rank, world_size, arrays, timeout_s, throttle_gbps) for rank in range(world_size)]
    from flashcp.comm.fabrics.cuda import CudaFabric

    tensors = virtual_memories(world_size, lambda size: torch.zeros(size, dtype=torch.uint8, device=device))
    return [
        CudaFabric("virtual", rank, world_size, device, tensors, timeout_s, throttle_gbps) for rank in range(world_size)
    ]
