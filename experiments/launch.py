"""Starting the ranks of a run, and telling in one line why it failed."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from flashcp.experiments.settings import Run
from flashcp.train.summary import write_json

__all__ = ["Outcome", "diagnose", "launch"]

BAD_INPUT = 2
COMPLAINT = re.compile(rb"(?:^|[\r\]])error: (.*)$", re.MULTILINE)  # a bar may stand before it on the line
TROUBLE = re.compile(rb"(?:^|[\r\]])(?:error: |Traceback )", re.MULTILINE)
LOST_RANK = re.compile(rb"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")


class Outcome(NamedTuple):
    """Exit code (0; 2 for bad input; else 1) and, when it is not 0, the line that says why, with the rank."""

    code: int
    error: str


def launch(run: Run, watch: Callable[[], None] | None = None) -> Outcome:
    """Run every rank to its end. What they say goes to out/ranks.log; without `watch` also to standard error.

    watch: called a few times a second while the ranks work, and once after.
    """
    out = Path(run.config.out)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    config, log = out / "config.json", out / "ranks.log"
    write_json(config, dataclasses.asdict(run.config))
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={run.world_size}"]
    command = [sys.executable, *(ranks if run.world_size > 1 else []), "-m", "flashcp.train", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(run.threads)}
    with log.open("wb") as written, log.open("rb") as said:
        process = subprocess.Popen(command, env=environment, stdout=written, stderr=subprocess.STDOUT)
        look = watch or Echo(said)
        try:
            while not _ended(process):
                look()
        finally:
            process.terminate()  # interrupted: the launcher stops its ranks; ended: does nothing
            process.wait()
        look()
    if process.returncode == 0:
        return Outcome(0, "")
    outcome = diagnose(log, process.returncode)
    if outcome.code == BAD_INPUT:  # found by the ranks: leave things as they were
        for file in (config, log):
            file.unlink()
        for folder in made:
            if not any(folder.iterdir()):
                folder.rmdir()
    return outcome


class Echo:
    """Copies a growing log to standard error, up to the first sign of trouble: the launcher's noise follows it."""

    def __init__(self, log: BinaryIO) -> None:
        self._log = log
        self._trouble = False

    def __call__(self) -> None:
        new = self._log.read()
        trouble = TROUBLE.search(new)
        if not self._trouble:
            sys.stderr.write(new[: trouble.start() if trouble else None].decode(errors="replace"))
            sys.stderr.flush()
        self._trouble |= trouble is not None


def _ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        return False
    return True


def diagnose(log: Path, code: int) -> Outcome:
    """Why a run failed, from what its ranks and their launcher said."""
    text = log.read_bytes()
    if complaint := COMPLAINT.search(text):
        line = complaint[1].decode(errors="replace")
        return Outcome(1 if line.startswith("rank ") else BAD_INPUT, line)
    if lost := LOST_RANK.search(text):
        return Outcome(1, f"rank {int(lost[2])}: ended with exit code {int(lost[1])}; see {log}")
    return Outcome(1, f"the run ended with exit code {code}; see {log}")
