"""Which transport runs: what was asked for, or the best there is, with the reason in words."""

from __future__ import annotations

import math
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from flashcp.comm.fabrics.base import Fabric, Region
from flashcp.comm.fabrics.memory import FOLDER, shared_memories
from flashcp.comm.fabrics.shm import ShmFabric
from flashcp.comm.handshake import Handshake
from flashcp.comm.heap import MIB, SymmetricHeap
from flashcp.comm.nvshmem import Nvshmem
from flashcp.comm.one_sided import OneSided
from flashcp.comm.transport import Alone, Transport
from flashcp.comm.two_sided import TwoSided

TRANSPORTS = ("shm", "gloo", "nccl", "cuda_symmetric", "nvshmem")


@dataclass(frozen=True)
class TransportOptions:
    """What few need to say about a one-sided transport. Raises ValueError for what is no number >= 0.

    heap_mib: most memory for receive buffers on a rank; 0: no limit.
    region_mib: the least that one receive buffer holds, so that plans can grow without a stop.
    throttle_gbps: GB/s at which rows leave, to study overlap on one machine; 0: at once.
    """

    heap_mib: float = 0.0
    region_mib: float = 0.0
    throttle_gbps: float = 0.0

    def __post_init__(self) -> None:
        for field, value in vars(self).items():
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{field}={value!r}: expected a number >= 0")


class Connection(NamedTuple):
    """What joins a rank to the others.

    transport: carries rows. handshake: compares notes, None where nobody has to. reason: why this transport, in words.
    """

    transport: Transport
    handshake: Handshake | None
    reason: str


def connect(group: dist.ProcessGroup | None, name: str, timeout_s: float, options: TransportOptions) -> Connection:
    """This rank's connection over a group; None: the default one, or this rank alone where none is initialised.

    name: of a transport; `auto`: the best that all ranks of the group can use. timeout_s: bound on every wait.

    All ranks of the group call this together. Raises ValueError for names that do not fit and groups that this rank is
    no member of.
    """
    launched = dist.is_available() and dist.is_initialized()
    if group is not None and (not launched or dist.get_rank(group) < 0):
        raise ValueError("group: expected a torch.distributed group that this rank is a member of, or None")
    if not launched or dist.get_world_size(group) == 1:
        if name not in ("auto", "none"):
            raise ValueError(f"transport={name!r}: expected one of auto, none")
        return Connection(Alone(), None, "one rank alone")
    handshake = Handshake(group, timeout_s)
    backend = str(dist.get_backend(group))
    hosts = len(set(handshake.share(_host().encode())))
    legal, why = _usable(backend, hosts)
    chosen, why = (legal[0], why) if name == "auto" else (name, "as asked")
    if chosen not in legal:
        where = "one host" if hosts == 1 else f"{hosts} hosts"
        raise ValueError(f"transport={name!r} over {backend} on {where}: expected one of auto, {', '.join(legal)}")
    transport: Transport
    if chosen == backend:
        transport = TwoSided(group, timeout_s)
    elif chosen == "nvshmem":
        transport = Nvshmem(group, timeout_s, torch.device("cuda", torch.cuda.current_device()))
    else:
        fabric = (_shm if chosen == "shm" else _cuda)(group, handshake, options.throttle_gbps)
        start_bytes, limit_bytes = int(options.region_mib * MIB), int(options.heap_mib * MIB)
        heap = SymmetricHeap(fabric, lambda: handshake.oldest, handshake.settle, start_bytes, limit_bytes)
        transport = OneSided(fabric, heap)
    return Connection(transport, handshake, why)


def _shm(group: dist.ProcessGroup | None, handshake: Handshake, throttle_gbps: float) -> Fabric:
    rank, ranks = handshake.rank, handshake.world_size
    return ShmFabric(rank, ranks, shared_memories(rank, handshake.share), handshake.timeout_s, throttle_gbps)


def _cuda(group: dist.ProcessGroup | None, handshake: Handshake, throttle_gbps: float) -> Fabric:
    from torch.distributed import _symmetric_memory as symmetric

    from flashcp.comm.fabrics.cuda import CudaFabric, symmetric_memories
    from flashcp.comm.fabrics.cuda_device import CudaDevice

    rank, ranks, timeout_s = handshake.rank, handshake.world_size, handshake.timeout_s
    gpu = torch.device("cuda", torch.cuda.current_device())
    device = CudaDevice(gpu, timeout_s)

    def retire(region: Region) -> None:
        device.synchronize()
        handshake.share(b"+")

    ranks_of = group if group is not None else dist.distributed_c10d._get_default_group()
    memories = symmetric_memories(symmetric, ranks_of, rank, device, gpu, handshake.share)
    return CudaFabric("cuda_symmetric", rank, ranks, device, memories, retire, timeout_s, throttle_gbps)


def _usable(backend: str, hosts: int) -> tuple[tuple[str, ...], str]:
    """Names that a group can run, whether they were ever run or not, and in words why no better one comes first."""
    symmetric = ("cuda_symmetric",) if hosts == 1 and torch.cuda.is_available() else ()
    if backend != "gloo":
        why = "not run between GPUs yet; nor were cuda_symmetric and nvshmem, ask for them by name"
        return (backend, *symmetric, "nvshmem"), why
    if hosts > 1:
        return ("gloo",), f"the ranks are on {hosts} hosts, and shm needs one"
    if not FOLDER.is_dir():
        return ("gloo", *symmetric), f"shm needs {FOLDER}"
    return ("shm", "gloo", *symmetric), "the ranks share one host's memory"


def _host() -> str:
    """The same for processes of one host that see the same shared memory.

    Hosts are told apart by name too: those that share a kernel may share /dev/shm, and still are different nodes to
    whoever started them.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    kernel = boot.read_text().strip() if boot.exists() else ""
    return f"{kernel}/{os.stat(FOLDER).st_dev if FOLDER.is_dir() else ''}/{socket.gethostname()}"
