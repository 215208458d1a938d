"""Equal shares of the machine's cores for every rank: control groups of the kernel, version 1 or 2.

Version 2 was not run: the machines this was built on keep the cpu controller in version 1.
"""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PERIOD_US = 20_000  # short beside a step: a rank that has used up its share stops for less
LEAST_SHARE = 0.05  # of a core: the kernel grants no less than 1 ms a period
PATIENCE_S = 10.0


@dataclass(frozen=True)
class Quotas:
    """A control group a rank. group: the folder above them. cores: of each rank."""

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
