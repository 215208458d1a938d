"""What overlap hides on one GPU, between ranks that are streams of one process.

`python -m flashcp.experiments.bench.virtual`. The first rank attends and the others only send, for they would compute
on GPUs of their own. Rows leave at a rate at which the first rank's take about as long as its tiles of local rows: with
all of it hidden a forward pass takes max(compute, transfer). Needs no hydra. On a CPU, with a thread a rank: to try it,
not to measure it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flashcp
from flashcp.comm.choice import Connection
from flashcp.comm.exchanges.exchange import Layout
from flashcp.comm.fabrics.base import Fabric, Region
from flashcp.comm.fabrics.memory import virtual_memories
from flashcp.comm.fabrics.shm import ShmFabric
from flashcp.comm.heap import SymmetricHeap
from flashcp.comm.one_sided import OneSided
from flashcp.context_parallel import ContextParallel
from flashcp.experiments.bench.harness import Work, in_turns
from flashcp.experiments.sweep.results import Number, to_row, write_rows
from flashcp.kernels.interface import KV
from flashcp.kernels.selection import select_attention
from flashcp.sharding.plan import ShardingPlan
from flashcp.train.ranks import Ranks

SIZES = {"ranks": 2, "tokens": 65_536, "heads": 8, "head_dim": 128}
LEVELS = ("none", "staged", "fused")
ROUNDS = 10
ATTENDING = 0
_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


@torch.no_grad()  # regions go back at the end of a call, not of a backward pass that never comes
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write rows. Returns 0."""
    parser = argparse.ArgumentParser(prog="bench_virtual", description=__doc__)
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/virtual"))
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, heads = torch.bfloat16 if device.type == "cuda" else torch.float32, (options.heads, options.head_dim)
    plan = flashcp.plan([options.tokens], options.ranks, "per_document")
    q, k, v = ([torch.randn(int(rows), *heads, device=device, dtype=dtype) for rows in plan.tokens] for _ in range(3))
    scale = options.head_dim**-0.5

    def median_ms(work: Work) -> float:
        return float(np.median(in_turns({"": work}, Ranks(0, 1, device), rounds=ROUNDS)[""]))

    local = q[ATTENDING], KV(k[ATTENDING], v[ATTENDING]), KV(k[ATTENDING][:0], v[ATTENDING][:0])
    tiles, kernel = Layout("exact", plan, ATTENDING).local_schedule, select_attention("auto", device)
    times = {"local_tiles_ms": median_ms(lambda: kernel.attend(*local, tiles, scale))}
    # On a GPU the delays of all who send share one way to the host, so the rows of all of them count.
    rows_bytes = int(plan.route("exact").sent_rows.sum()) * 2 * k[0][0].nbytes
    throttle_gbps = rows_bytes / (times["local_tiles_ms"] * 1e6)
    free = VirtualRanks(options.ranks, device, overlap="none")
    times["compute_ms"] = median_ms(lambda: free.forward(plan, q, k, v, scale, [ATTENDING]))
    (expected,) = free.forward(plan, q, k, v, scale, [ATTENDING])
    for overlap in LEVELS:
        ranks = VirtualRanks(options.ranks, device, overlap=overlap, throttle_gbps=throttle_gbps)
        (out,) = ranks.forward(plan, q, k, v, scale, [ATTENDING])
        torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
        times[f"{overlap}_ms"] = median_ms(lambda ranks=ranks: ranks.forward(plan, q, k, v, scale, [ATTENDING]))  # type: ignore[misc]
    times["transfer_ms"] = max(0.0, times["none_ms"] - times["compute_ms"])  # `none` waits first and computes then
    bound = max(times["compute_ms"], times["transfer_ms"])
    numbers = [Number("flashcp", metric, "ms", None, value, None) for metric, value in times.items()]
    numbers += [Number("flashcp", f"{x}_over_bound", "1", None, times[f"{x}_ms"] / bound, None) for x in LEVELS]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    versions = f"flashcp {flashcp.__version__}, torch {torch.__version__}"
    case = f"{options.ranks}_ranks_{options.tokens}_{options.heads}x{options.head_dim}"
    options.out.mkdir(parents=True, exist_ok=True)
    write_rows(options.out, [to_row(case, number, name, of_versions=versions) for number in numbers])
    print("\n".join(f"{number.metric:<20} {number.median:9.3f} {number.unit}" for number in numbers))
    return 0


class VirtualRanks:
    """The one-sided exchange between ranks of one process.

    Every rank is a `ContextParallel` with its own transport, heap and receive buffers, and puts rows into the others'
    as processes do. What is missing is the handshake: one process agrees with itself. All ranks' rows leave before any
    rank computes. On a GPU the backward pass works as well: the host waits for nothing, once all kernels are loaded.

    exchange, overlap, backward, timeout_s: as for `flashcp.ContextParallel`. throttle_gbps: GB/s at which each rank's
    rows leave, 0 for no limit. Raises ValueError where streams of several ranks would share a hardware queue of the GPU
    (`check_connections`).
    """

    def __init__(
        self,
        world_size: int,
        device: torch.device,
        exchange: str = "exact",
        overlap: str = "staged",
        backward: str = "keep",
        throttle_gbps: float = 0.0,
        timeout_s: float = 20.0,
    ) -> None:
        self.device = device
        self._retired: list[Region] = []
        self._oldest = 0
        self._loaded: set[tuple[object, ...]] = set()
        self.streams: list[torch.cuda.Stream] = []
        self._fabrics: list[Fabric]
        if device.type == "cuda":
            check_connections(world_size, os.environ)
            self.streams = [torch.cuda.Stream(device) for _ in range(world_size)]
            self._fabrics = _on_gpu(world_size, device, self._retired, timeout_s, throttle_gbps)
        else:
            arrays = virtual_memories(world_size, lambda size: np.zeros(size, dtype=np.uint8))
            every = range(world_size)
            self._fabrics = [ShmFabric(rank, world_size, arrays, timeout_s, throttle_gbps) for rank in every]
        self._transports = [
            OneSided(fabric, SymmetricHeap(fabric, lambda: self._oldest, lambda: None)) for fabric in self._fabrics
        ]
        joined = [Connection(transport, None, "ranks of one process") for transport in self._transports]
        self.ranks = [ContextParallel(each, exchange, overlap, backward=backward) for each in joined]

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
        kernels = plan.fingerprint, q[0].shape[1:], k[0].shape[1:], q[0].dtype
        if self.device.type == "cuda" and kernels not in self._loaded:
            self._loaded.add(kernels)
            self._load_kernels(plan, (q, k, v))
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
            if attending is None or rank in attending:
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

    def _load_kernels(self, plan: ShardingPlan, qkv: Sequence[Sequence[Tensor]]) -> None:
        """Run both passes once on such rows with nobody waiting for anybody; their results mean nothing.

        The first launch of a kernel waits until the GPU has done all it holds, and in a backward pass that may be a
        rank's wait for rows which this same thread would queue next.
        """
        fabrics: Any = self._fabrics
        for fabric in fabrics:
            fabric.waiting = False
        try:
            with torch.enable_grad():
                q, k, v = leaves = [[x.detach().clone().requires_grad_() for x in each] for each in qkv]
                outs = self.forward(plan, q, k, v)
                torch.autograd.grad(outs, [x for each in leaves for x in each], [torch.zeros_like(out) for out in outs])
                torch.cuda.synchronize(self.device)
        finally:
            for fabric in fabrics:
                fabric.waiting = True

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


if __name__ == "__main__":
    sys.exit(main())
