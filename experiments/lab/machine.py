"""What a lab has of its machine: it is alone there, its ranks have equal shares of the cores, and it sees how much of
them went to others while it measured."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashcp.train.ranks import Ranks

LOCK = Path("/run/flashcp-lab.lock")
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PERIOD_US = 20_000  # short beside a step: a rank that has used up its share stops for less
LEAST_SHARE = 0.05  # of a core: the kernel grants no less than 1 ms a period
PATIENCE_S = 10.0
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
TAKEN = "taken_cores"
"""Metric of a lab: cores that others used while it measured and that its ranks were to have."""


class LabError(RuntimeError):
    """The lab cannot be built here; the message says in one line what is missing."""


@contextmanager
def lock() -> Iterator[None]:
    """Raises LabError where another lab runs on this machine."""
    try:
        opened = LOCK.open("a+")
    except OSError as error:
        raise LabError(f"the lab needs {LOCK}, which says that a lab runs: {error.strerror}") from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise LabError(f"another lab runs on this machine: process {file.read().strip()}") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the lab as Ctrl-C does, with everything removed, where nobody else took them."""
    ours = threading.current_thread() is threading.main_thread()
    taken = [number for number in ENDING if ours and signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Signals count for nothing meanwhile: a second Ctrl-C would leave half of a lab behind."""
    ours = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING if ours}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- equal shares of the cores


@dataclass(frozen=True)
class Quotas:
    """A control group a rank, of version 1 or 2. group: the folder above them. cores: of each rank.

    Version 2 was not run: the machines this was built on keep the cpu controller in version 1.
    """

    group: Path
    cores: float

    @classmethod
    def make(cls, name: str, ranks: int, cores: float) -> Quotas:
        """Groups for so many ranks that share `cores` cores. Raises ValueError as `share_of`, OSError where control
        groups cannot be made."""
        share = share_of(cores, ranks)
        root, version = _controller()
        quotas = cls(root / name, share)
        if version == 2:  # below it groups have quotas; most machines say so already
            (root / "cgroup.subtree_control").write_text("+cpu")
        for folder in (quotas.group, quotas.group / "agents", *(quotas.of(rank) for rank in range(ranks))):
            folder.mkdir()
            if version == 2 and folder == quotas.group:
                (folder / "cgroup.subtree_control").write_text("+cpu")
        quota_us = round(share * PERIOD_US)
        for rank in range(ranks):
            if version == 2:
                (quotas.of(rank) / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
            else:
                (quotas.of(rank) / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (quotas.of(rank) / "cpu.cfs_quota_us").write_text(str(quota_us))
        return quotas

    @property
    def agents(self) -> Path:
        """Where a launcher enters itself, for the end of the lab to find it; it has no quota."""
        return self.group / "agents" / "cgroup.procs"

    def of(self, rank: int) -> Path:
        """A rank's group."""
        return self.group / f"rank{rank}"

    @property
    def enter(self) -> list[str]:
        """The beginning of a command of torchrun's: it enters the group of its RANK, and becomes the rest.

        The shell enters itself as process 0, for torchrun reads $$ as a $ of its own.
        """
        groups = shlex.quote(str(self.group))
        return ["sh", "-c", f'echo 0 > {groups}/rank"$RANK"/cgroup.procs && exec "$@"', "rank"]

    @staticmethod
    def remove(name: str) -> None:
        """Kill whoever is in the groups of that name, and remove them. Raises OSError if somebody does not die."""
        for group in (root / name for root, _ in _mounts()):
            folders = [*(path for path in group.glob("*") if path.is_dir()), group] if group.is_dir() else []
            deadline = time.monotonic() + PATIENCE_S
            while _kill(folders) and time.monotonic() < deadline:
                time.sleep(0.02)
            for folder in folders:
                folder.rmdir()


def share_of(cores: float, ranks: int) -> float:
    """Of each rank. Raises ValueError where it is too small, and for cores that the machine does not have."""
    most = os.cpu_count() or 1
    if not LEAST_SHARE * ranks <= cores <= most:
        raise ValueError(
            f"cores={cores:g} for {ranks} ranks: expected at least {LEAST_SHARE:g} of a core each, and no more than "
            f"the {most} of this machine"
        )
    return cores / ranks


def _kill(folders: list[Path]) -> bool:
    """Whether somebody was there to be killed."""
    found = False
    for folder in folders:
        for process in (folder / "cgroup.procs").read_text().split():
            found = True
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
    return found


def _controller() -> tuple[Path, int]:
    """Where the cpu controller is, and of which version."""
    for root, version in _mounts():
        if version == 1 or "cpu" in (root / "cgroup.controllers").read_text().split():
            return root, version
    raise OSError("control groups with the cpu controller, of which none is mounted")


def _mounts() -> Iterator[tuple[Path, int]]:
    """Mounted control groups: version 1 of the cpu controller, and version 2."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, folder, kind, options, *_ = line.split()
        if kind == "cgroup" and "cpu" in options.split(","):
            yield Path(folder), 1
        if kind == "cgroup2":
            yield Path(folder), 2


# --- work of others


class Others:
    """Watches from its making on. Every rank makes one, and all ask together.

    Interrupts are nobody's: the lab's own sockets make most of them.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._begun = self._now()

    def taken(self, cores: float) -> float:
        """Cores that others kept busy on average, beyond those that the machine has besides the ranks' `cores`."""
        machine, rank, wall = (late - early for early, late in zip(self._begun, self._now(), strict=True))
        (lab,) = self._ranks.sum(rank)
        return max(0.0, (machine - lab) / wall - ((os.cpu_count() or 1) - cores))

    def _now(self) -> tuple[float, float, float]:
        """CPU seconds of the machine and of this rank, and the time."""
        user, nice, system, _, _, _, _, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        return TICK_S * (user + nice + system + steal), time.process_time(), time.monotonic()
