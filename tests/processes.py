"""Launchers and their ranks as processes of this machine: started, found by a mark in their environment, killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.checkout import ROOT

MARK = "FLASHCP_TEST_JOB"
SOON_S = 15.0
"""All processes of a job are gone by then, whichever was killed."""


def torchrun(*options: str) -> list[str]:
    """Two ranks that train what the configuration names that follows."""
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    return [*ranks, "-m", "flashcp.train"]


def flashcp_train(*words: str) -> list[str]:
    """`flashcp train` of a small model on two ranks."""
    model = ["model.layers=2", "model.dim=32", "model.heads=4", "model.kv_heads=2"]
    small = [*model, "context=515", "loop.device=cpu", "tracker.wandb=disabled"]
    return [sys.executable, "-m", "flashcp.experiments.cli.main", "train", *small, *words]


def parent_of(process: int) -> int:
    """Raises OSError where there is no such process."""
    return int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])


class Job:
    """A launcher and everything that it started, directly or not. folder: `run` in it is the job's `out`."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        with self.log.open("wb") as log:
            self.launcher = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, MARK: str(folder), "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def steps(self) -> int:
        """How many are in metrics.jsonl."""
        rows = self.folder / "run/metrics.jsonl"
        return rows.read_bytes().count(b"\n") if rows.exists() else 0

    def processes(self) -> dict[int, list[str]]:
        """Those that run, and what variables they have."""
        found, mark = {}, f"{MARK}={self.folder}"
        for place in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                variables = place.read_bytes().decode(errors="replace").split("\0")
                if mark in variables and "State:\tZ" not in (place.parent / "status").read_text():
                    found[int(place.parent.name)] = variables
        return found

    def ranks(self) -> dict[int, int]:
        """rank -> process; what a rank itself has started has a rank as its parent."""
        numbers = {
            process: next((int(each[5:]) for each in variables if each.startswith("RANK=")), -1)
            for process, variables in self.processes().items()
        }
        ranks = {}
        for process, number in numbers.items():
            with suppress(OSError):
                if number >= 0 and numbers.get(parent_of(process), -1) < 0:
                    ranks[number] = process
        return ranks

    def gone(self, seconds: float = SOON_S) -> float:
        """Wait until none runs; how long that took. Fails after `seconds`."""
        return wait(lambda: self.launcher.poll() is not None and not self.processes(), seconds)


@contextmanager
def under_way(command: Sequence[str], folder: Path, steps: int = 2) -> Iterator[Job]:
    """A job that has done so many steps. What is left of it is killed at the end."""
    job = Job(command, folder)
    try:
        wait(lambda: job.steps() >= steps or job.launcher.poll() is not None, 120.0)
        yield job
    finally:
        for process in (*job.processes(), *([job.launcher.pid] if job.launcher.poll() is None else [])):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        job.launcher.wait()


def wait(until: Callable[[], bool], seconds: float) -> float:
    """Until that holds; how long that took. Fails after `seconds`."""
    started = time.monotonic()
    while not until():
        assert time.monotonic() < started + seconds, f"waited {seconds:g} s"
        time.sleep(0.05)
    return time.monotonic() - started
