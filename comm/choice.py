"""Which transport runs: what was asked for, or the best there is, with the reason in words."""

from __future__ import annotations

import json
import math
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from flashcp.comm.errors import ExchangeError, PeerFailedError, PlanMismatchError, RowsDifferError
from flashcp.comm.fabrics.base import Fabric, Region
from flashcp.comm.fabrics.memory import FOLDER, has_shared_memory, shared_memories
from flashcp.comm.fabrics.shm import ShmFabric
from flashcp.comm.handshake import Handshake
from flashcp.comm.heap import MIB, SymmetricHeap
from flashcp.comm.levels import Level, make_levels
from flashcp.comm.mail import Mail
from flashcp.comm.nvshmem import Nvshmem
from flashcp.comm.one_sided import OneSided
from flashcp.comm.transport import Alone, Transport
from flashcp.comm.two_sided import TwoSided
from flashcp.comm.verified import VERIFIABLE, Verified
from flashcp.sharding.values import read_number, shown

TRANSPORTS = ("shm", "gloo", "nccl", "cuda_symmetric", "nvshmem")


@dataclass(frozen=True)
class TransportOptions:
    """What few need to say about a one-sided transport. Raises ValueError for what is no number >= 0.

    heap_mib: most memory for receive buffers on a rank; 0: no limit.
    region_mib: the least that one receive buffer holds, so that plans can grow without a stop.
    throttle_gbps: GB/s at which rows leave (with head ranks: for other holders), to study overlap on one machine; 0: at
    once.
    """

    heap_mib: float = 0.0
    region_mib: float = 0.0
    throttle_gbps: float = 0.0

    def __post_init__(self) -> None:
        for field, value in vars(self).items():
            read_number(field, value, lambda number: 0 <= number < math.inf, "a number >= 0")


class Connection(NamedTuple):
    """What joins a rank to the others.

    transport: carries rows between holders. handshake: compares notes, None where nobody has to. reason: why these
    transports, in words. inside: carries rows between the ranks of this holder; None where a rank is a holder.
    """

    transport: Transport
    handshake: Handshake | None
    reason: str
    inside: Transport | None = None

    @property
    def name(self) -> str:
        """The transport's; `INSIDE+BETWEEN`, such as `shm+gloo`, where rows travel inside holders and between them."""
        levels = (self.inside, self.transport)
        return "+".join(level.name for level in levels if level and level.world_size > 1) or self.transport.name

    @property
    def oldest(self) -> dict[str, int]:
        """The oldest inboxes that this rank still reads, as fields of its next header."""
        return {"oldest": self.transport.oldest, "oldest_inside": self.inside.oldest if self.inside else 0}

    def meet(self) -> None:
        """Return when the ranks are known to agree whose rows are about to be read or sent on: all, where rows leave a
        holder by a collective operation, else those of this holder. Raises as `Handshake.compare`."""
        if self.handshake is not None and self.handshake.inside is not None and self.transport.one_sided:
            self.handshake.meet_inside()
        elif self.handshake is not None:
            self.handshake.settle()

    @contextmanager
    def watched(self, call: int) -> Iterator[None]:
        """Errors name the call; ranks that do not wait for this one hear of its failure at their next call."""
        if self.handshake is not None:
            self.handshake.call = call
        try:
            yield
        except ExchangeError as error:
            if self.handshake is not None:
                self.handshake.stop(error)
                if not isinstance(error, PlanMismatchError | PeerFailedError | RowsDifferError):  # which all ranks know
                    self.handshake.abandon(call)
            if re.search(r"\bcall \d", str(error)):
                raise
            named = copy(error)  # a transport may raise it again, in another call
            named.args = (f"{error} (call {call})",)
            raise named from error


def connect(
    group: dist.ProcessGroup | DeviceMesh | None,
    name: str,
    timeout_s: float,
    options: TransportOptions,
    head_ranks: int = 1,
    verify_rows: bool = False,
    version: str = "",
) -> Connection:
    """This rank's connection over a group; None: the default one, or this rank alone where none is initialised.

    name: of a transport; `auto`: the best that all ranks can use, on each level; two names joined by a plus are those
    of the level inside a holder and of that between holders. timeout_s: bound on every wait. head_ranks: of a holder.
    verify_rows: checksums travel beside rows. version: of this program.

    All ranks of the group call this together. Raises ValueError for names and numbers that do not fit, those and
    versions that differ between ranks, and groups that this rank is no member of; ExchangeError where another rank
    does not come or a time-out ended the group.
    """
    levels = make_levels(group, head_ranks, timeout_s)
    names = name.split("+")
    if len(names) > max(1, len(levels)):
        raise ValueError(f"transport={name!r}: expected one name, for rows travel on one level")
    if not levels:
        if name not in ("auto", "none"):
            raise ValueError(f"transport={shown(name)}: expected one of auto, none")
        return Connection(Alone(), None, "one rank alone", Alone() if head_ranks > 1 else None)
    mails = [Mail(level.group, timeout_s, level.ranks) for level in levels]
    for mail in mails:
        _check_same(
            mail,
            {
                "version of flashcp": version[:64],
                "transport": name,
                "heap_mib": options.heap_mib,
                "region_mib": options.region_mib,
                "head_ranks": head_ranks,
            },
        )
        mail.set_apart()
    handshake = Handshake(mails[-1], mails[0] if len(mails) == 2 else None)
    between: Transport = Alone()
    inside: Transport | None = None
    reasons = []
    each = names if len(names) == len(levels) else names * len(levels)  # one name stands for both levels
    for level, mail, one in zip(levels, mails, each, strict=True):
        # The links between nodes are the slow ones.
        slowed = options if level is levels[-1] else replace(options, throttle_gbps=0.0)
        transport, why = _transport(level, mail, one, handshake, slowed)
        if verify_rows and transport.name not in VERIFIABLE:
            raise ValueError(
                f"verify_rows=True over {transport.name}: expected a transport whose rows the host waits for, "
                f"{' or '.join(VERIFIABLE)}"
            )
        transport = Verified(transport, mail.names, handshake.note) if verify_rows else transport
        reasons.append(why)
        if level.inside:
            inside = transport
        else:
            between = transport
    return Connection(between, handshake, "; between holders: ".join(reasons), inside)


def _check_same(mail: Mail, mine: dict[str, object]) -> None:
    """Raise ValueError on all ranks, naming ranks and values, for settings that differ between them."""
    said = [json.loads(words) for words in mail.share(json.dumps(mine).encode())]
    for field in mine:
        values = {name: one.get(field) for name, one in zip(mail.names, said, strict=True)}
        if len(set(values.values())) > 1:
            told = ", ".join(f"{value!r} on rank {rank}" for rank, value in list(values.items())[:8])
            raise ValueError(f"{field} is {told}: expected one value on all ranks")


def _transport(
    level: Level, mail: Mail, name: str, handshake: Handshake, options: TransportOptions
) -> tuple[Transport, str]:
    """What carries rows among the ranks of a level, and in words why."""
    backend = str(dist.get_backend(level.group))
    hosts = len(set(mail.share(_host().encode())))
    legal, why = _usable(backend, hosts)
    chosen, why = (legal[0], why) if name == "auto" else (name, "as asked")
    if chosen not in legal:
        where = "one host" if hosts == 1 else f"{hosts} hosts"
        raise ValueError(f"transport={name!r} over {backend} on {where}: expected one of auto, {', '.join(legal)}")
    if chosen == backend:
        return TwoSided(level.group, mail.timeout_s, mail.names), why
    if chosen == "nvshmem":
        return Nvshmem(level.group, mail.timeout_s, torch.device("cuda", torch.cuda.current_device())), why
    fabric = FABRICS[chosen](level.group, mail, options.throttle_gbps)
    fabric.names = mail.names
    start_bytes, limit_bytes = int(options.region_mib * MIB), int(options.heap_mib * MIB)
    heap = SymmetricHeap(fabric, lambda: handshake.oldest[level.inside], handshake.settle, start_bytes, limit_bytes)
    return OneSided(fabric, heap), why


def _shm(group: dist.ProcessGroup | None, mail: Mail, throttle_gbps: float) -> Fabric:
    memories = shared_memories(mail.rank, mail.share, mail.names)
    return ShmFabric(mail.rank, mail.world_size, memories, mail.timeout_s, throttle_gbps)


def _cuda(group: dist.ProcessGroup | None, mail: Mail, throttle_gbps: float) -> Fabric:
    from torch.distributed import _symmetric_memory as symmetric

    from flashcp.comm.fabrics.cuda import CudaFabric, symmetric_memories
    from flashcp.comm.fabrics.cuda_device import CudaDevice

    rank, ranks, timeout_s = mail.rank, mail.world_size, mail.timeout_s
    gpu = torch.device("cuda", torch.cuda.current_device())
    device = CudaDevice(gpu, timeout_s)

    def retire(region: Region) -> None:
        device.synchronize()
        mail.share(b"+")

    ranks_of = group if group is not None else dist.distributed_c10d._get_default_group()
    memories = symmetric_memories(symmetric, ranks_of, rank, device, gpu, mail.share, mail.names)
    return CudaFabric("cuda_symmetric", rank, ranks, device, memories, retire, timeout_s, throttle_gbps)


FABRICS = {"shm": _shm, "cuda_symmetric": _cuda}
"""By the transport's name."""


def _usable(backend: str, hosts: int) -> tuple[tuple[str, ...], str]:
    """Names that a group can run, whether they were ever run or not, and in words why no better one comes first."""
    symmetric = ("cuda_symmetric",) if hosts == 1 and torch.cuda.is_available() else ()
    if backend != "gloo":
        why = "not run between GPUs yet; nor were cuda_symmetric and nvshmem, ask for them by name"
        return (backend, *symmetric, "nvshmem"), why
    if hosts > 1:
        return ("gloo",), f"the ranks are on {hosts} hosts, and shm needs one"
    if not has_shared_memory():
        return ("gloo", *symmetric), f"shm needs {FOLDER} and files without a name there"
    return ("shm", "gloo", *symmetric), "the ranks share one host's memory"


def _host() -> str:
    """The same for processes of one host that see the same shared memory and each other.

    Hosts are told apart by name too: those that share a kernel may share /dev/shm, and still are different nodes to
    whoever started them.
    """
    boot, processes = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    kernel = boot.read_text().strip() if boot.exists() else ""
    seen = (FOLDER.stat().st_dev, processes.stat().st_ino) if has_shared_memory() and processes.exists() else ()
    return f"{kernel}/{seen}/{socket.gethostname()}"
