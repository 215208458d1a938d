"""Which transport runs: what was asked for, or the best there is, with the reason in words."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from flashcp.comm.fabrics.shm import FOLDER, ShmFabric
from flashcp.comm.handshake import Handshake
from flashcp.comm.heap import MIB, SymmetricHeap
from flashcp.comm.one_sided import OneSided
from flashcp.comm.transport import Transport
from flashcp.comm.two_sided import TwoSided

__all__ = ["TRANSPORTS", "TransportOptions", "choose_transport"]

TRANSPORTS = ("shm", "gloo", "nccl", "cuda_symmetric", "nvshmem")
_log = logging.getLogger("flashcp")


class TransportOptions(NamedTuple):
    """timeout_s: bound on every wait. heap_mib: most memory for receive buffers on a rank, 0 for no limit.
    region_mib: the least that one receive buffer holds. throttle_gbps: GB/s of the puts of `shm`, 0 for no limit."""

    timeout_s: float
    heap_mib: float = 0.0
    region_mib: float = 0.0
    throttle_gbps: float = 0.0


def choose_transport(
    name: str, group: dist.ProcessGroup | None, handshake: Handshake, options: TransportOptions
) -> Transport:
    """The transport of that name, or for `auto` the best that all ranks of the group can use; all ranks call this.

    Raises ValueError for names that do not fit the group.
    """
    backend = str(dist.get_backend(group))
    hosts = {words.decode(errors="replace") for words in handshake.share(_host().encode())}
    chosen, why = _best(backend, len(hosts)) if name == "auto" else (name, "as asked")
    legal = _legal(backend, len(hosts))
    if chosen not in legal:
        raise ValueError(
            f"transport={name!r} over {backend} on {len(hosts)} hosts: expected one of auto, {', '.join(legal)}"
        )
    if handshake.rank == 0:
        _log.info("transport %s: %s", chosen, why)
    if chosen == backend:
        return TwoSided(group, options.timeout_s)
    fabric = _fabric(chosen, handshake, options)
    start_bytes, limit_bytes = int(options.region_mib * MIB), int(options.heap_mib * MIB)
    heap = SymmetricHeap(fabric, lambda: handshake.oldest, handshake.settle, start_bytes, limit_bytes)
    return OneSided(fabric, heap)


def _fabric(name: str, handshake: Handshake, options: TransportOptions) -> ShmFabric:
    assert name == "shm"
    return ShmFabric(handshake.rank, handshake.world_size, handshake.share, options.timeout_s, options.throttle_gbps)


def _legal(backend: str, hosts: int) -> tuple[str, ...]:
    if backend != "gloo":
        return (backend,)
    return ("shm", "gloo") if hosts == 1 and FOLDER.is_dir() else ("gloo",)


def _best(backend: str, hosts: int) -> tuple[str, str]:
    if backend != "gloo":
        return backend, "the group's own"
    if hosts > 1:
        return "gloo", f"the ranks are on {hosts} hosts, and shm needs one"
    if not FOLDER.is_dir():
        return "gloo", f"shm needs {FOLDER}"
    return "shm", "the ranks share one host's memory"


def _host() -> str:
    """The same for processes that see the same shared memory."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    identity = boot.read_text().strip() if boot.exists() else socket.gethostname()
    return f"{identity}/{os.stat(FOLDER).st_dev if FOLDER.is_dir() else ''}"
