"""Starting the ranks of a run, and telling in one line why it failed."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
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
LOST_RANK = re.compile(rb"failed \(exitcode: (?P<code>-?\d+)\) local_rank: (?P<rank>\d+)")
FAILED_RANK = re.compile(rb"rank +: (?P<rank>\d+) \(local_rank: \d+\)\s+exitcode +: (?P<code>-?\d+)")
GLOO_NOISE = re.compile(
    r"\[[^\]\s]*\.(?:cc|h):\d+\] |[.,]? *(?:This may indicate .*|Please check logs .*|\.\.\.GLHF!.*)$"
)
METRICS = "metrics.jsonl"  # the ranks' first file


class Outcome(NamedTuple):
    """Exit code (0; 2 for bad input; else 1) and, when it is not 0, the line that says why, with the rank."""

    code: int
    error: str


def launch(run: Run, watch: Callable[[], None] | None = None) -> Outcome:
    """Run every rank to its end. What they say goes to out/ranks.log; without `watch` also to standard error.

    watch: called a few times a second while the ranks work, and once after. Bad input that the ranks find before
    the first step leaves nothing in `out`. Raises ValueError when `out` cannot be written.
    """
    out = Path(run.config.out)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    config, log = out / "config.json", out / "ranks.log"
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(config, dataclasses.asdict(run.config))
        log.write_bytes(b"")
    except OSError as error:
        raise ValueError(f"out={str(out)!r}: cannot be written ({error.strerror}: {error.filename})") from error
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={run.world_size}"]
    command = [sys.executable, *(ranks if run.world_size > 1 else []), "-m", "flashcp.train", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(run.threads)}
    with log.open("wb") as written, log.open("rb") as said:
        look = watch or Echo(said)
        process = subprocess.Popen(command, env=environment, stdout=written, stderr=subprocess.STDOUT)
        try:
            while not _ended(process):
                look()
        finally:
            process.terminate()  # interrupted or stopped: the launcher stops its ranks; ended: does nothing
            process.wait()
        look()
    if process.returncode == 0:
        return Outcome(0, "")
    outcome = diagnose(log, process.returncode)
    if outcome.code == BAD_INPUT and not (out / METRICS).exists():  # found before the first step: leave no trace
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
    """Why a run failed, from what its ranks and their launcher said.

    A rank that a signal ended comes first: the others complain only of a connection that it closed.
    """
    text = log.read_bytes()
    ended = {int(found["rank"]): int(found["code"]) for found in FAILED_RANK.finditer(text)}
    ended = {rank: status for rank, status in ended.items() if status != -signal.SIGTERM}  # the launcher's doing
    ended |= {int(found["rank"]): int(found["code"]) for found in LOST_RANK.finditer(text)}
    complaints = [found[1].decode(errors="replace") for found in COMPLAINT.finditer(text)]
    killed = [rank for rank, status in ended.items() if status < 0]
    silent = [rank for rank in killed if not any(line.startswith(f"rank {rank} of ") for line in complaints)]
    if complaints and not silent:
        line = " ".join(GLOO_NOISE.sub("", complaints[0]).split())
        return Outcome(1 if line.startswith("rank ") else BAD_INPUT, line)
    if ended:
        rank = min(silent or ended)
        return Outcome(1, f"rank {rank}: ended with exit code {_spelled(ended[rank])}; see {log}")
    return Outcome(1, f"the run ended with exit code {_spelled(code)}; see {log}")


def _spelled(code: int) -> str:
    """An exit code; for a negative one also the signal's name."""
    names = {-number: number.name for number in signal.Signals}
    return f"{code} ({names[code]})" if code in names else str(code)
