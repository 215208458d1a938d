"""The ranks of one run: started by `python -m torch.distributed.run`, or one process alone."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from flashcp.limits import LONGEST_WAIT_S
from flashcp.train.heartbeat import Heartbeat, start_number

__all__ = ["DEVICES", "LONGEST_WAIT_S", "Ranks", "Replica", "exit_code", "launched_rank", "world"]

DEVICES = ("auto", "cpu", "cuda")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Replica:
    """The ranks that share one plan, and this one among them.

    index: of `count` replicas. rank: of this process in its replica. group: None where there is one replica.
    """

    index: int
    count: int
    rank: int
    group: dist.ProcessGroup | None


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of the run, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None  # that they talk in; None: the default one
    heartbeat: Heartbeat | None = None

    def beside(self, timeout_s: float) -> Ranks:
        """The same ranks in a group of their own, for a thread that talks while others do. Every rank must call it."""
        if not dist.is_initialized():
            return self
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        return Ranks(self.rank, self.world_size, torch.device("cpu"), group)

    def sum(self, *values: float) -> list[float]:
        """Each value summed over ranks, in fp64. Every rank must call it."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, *values: float) -> list[float]:
        """Each value's maximum over ranks. Every rank must call it."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.sum(0.0)

    def told(self, make: Callable[[], Value]) -> Value:
        """What rank 0 makes, on all ranks; where that is a ValueError, all raise it. Every rank must call it."""
        said: list[Value | ValueError | None] = [None]
        if self.rank == 0:
            try:
                said = [make()]
            except ValueError as error:
                said = [error]
        if dist.is_initialized():
            dist.broadcast_object_list(said, group=self.group)
        if isinstance(said[0], ValueError):
            raise said[0]
        return said[0]  # type: ignore[return-value]

    def gather(self, value: Value) -> list[Value]:
        """Each rank's value, a plain object, in rank order. Every rank must call it."""
        if not dist.is_initialized():
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def replica(self, replicas: int) -> Replica:
        """This rank's replica of `replicas` equal ones, of consecutive ranks. Every rank must call it."""
        size = self.world_size // replicas
        index = self.rank // size
        if replicas == 1:
            return Replica(0, 1, self.rank, None)
        groups = [dist.new_group(range(first, first + size)) for first in range(0, self.world_size, size)]
        return Replica(index, replicas, self.rank % size, groups[index])

    def _reduce(self, values: tuple[float, ...], how: dist.ReduceOp.RedOpType) -> list[float]:
        if not dist.is_initialized():
            return list(values)
        packed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(packed, how, group=self.group)
        return packed.tolist()


def launched_rank() -> tuple[int, int]:
    """Rank and world size: of the process group if there is one, else as the launcher says; (0, 1) alone."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def world(device: str, timeout_s: float, silent_s: float = 0.0) -> Iterator[Ranks]:
    """Join the run's ranks and leave them at the end: nccl with a GPU for each local rank, else gloo.

    A default process group that is there already is used and left alone; a process that no launcher started
    is one rank without a group. device: `auto`, `cpu` or `cuda`. silent_s: after which a rank that says nothing is
    named and the others end (`flashcp.train.heartbeat`); 0: ranks do not watch each other.
    Raises ValueError for `cuda` without a GPU.
    """
    rank, world_size = launched_rank()
    here = _device(device)
    if dist.is_initialized() or "RANK" not in os.environ:
        yield Ranks(rank, world_size, here)
        return
    own_gpu = here.type == "cuda" and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(
        "nccl" if own_gpu else "gloo",
        timeout=timeout,
        device_id=here if own_gpu else None,
        **_launchers_store(rank, world_size, timeout),
    )
    heartbeat = Heartbeat(rank, world_size, silent_s) if silent_s else None
    try:
        yield Ranks(rank, world_size, here, heartbeat=heartbeat)
    except BaseException:
        if heartbeat:
            heartbeat.kill_the_stopped()
        raise
    finally:
        dist.destroy_process_group()
        if heartbeat:
            heartbeat.close()


def _launchers_store(rank: int, world_size: int, timeout: timedelta) -> dict[str, Any]:
    """What `init_process_group` is told where torchrun keeps a store for its ranks.

    The store outlives ranks that are started again, and torch (2.13) reads what the dead ones wrote: addresses where
    nobody listens. So every start has a part of the store to itself.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
    return {"store": dist.PrefixStore(f"flashcp/start/{start_number()}", store), "rank": rank, "world_size": world_size}


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("loop.device='cuda': there is no GPU here; expected auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def exit_code(work: Callable[[], object]) -> int:
    """Do this rank's work. Returns 0; 2 for bad input (one line, no traceback); 1 when it fails (its rank in the line,
    and where the error has notes of where it was raised, those).

    The lines begin with `error:`: whoever started the ranks finds them in what they said.
    """
    try:
        work()
    except ValueError as error:
        if _first_to_report():
            _say(str(error))
        return 2
    except Exception as error:
        rank, world_size = launched_rank()
        if _first_to_report():
            traceback.print_exc()
        where = "".join(f"{note}: " for note in getattr(error, "__notes__", ()))
        _say(f"rank {rank} of {world_size}: {where}{type(error).__name__}: {error}")
        return 1
    return 0


def _say(message: str) -> None:
    print("error:", " ".join(message.split()), file=sys.stderr, flush=True)


def _first_to_report() -> bool:
    """Whether no other rank has reported yet: all ranks meet the same bad input, and one line should say so.

    The launcher's store counts, because the launcher stops all ranks when the first one ends: rank 0 may
    never come to speak.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    port = int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=timedelta(seconds=5))
    return store.add(f"flashcp/reports/{start_number()}", 1) == 1
