"""Starting ranks, and telling in one line why they failed."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import torch

from flashcp.experiments.folders import leave_no_trace
from flashcp.train.config import TrainConfig
from flashcp.train.summary import write_json

if TYPE_CHECKING:  # it reads Hydra's configuration, which not every machine that measures has
    from flashcp.experiments.cli.settings import Run

__all__ = [
    "BAD_INPUT",
    "Outcome",
    "RanksFailedError",
    "diagnose",
    "launch",
    "leave_no_trace",
    "rank_environment",
    "start_ranks",
]

BAD_INPUT = 2
COMPLAINT = re.compile(rb"(?:^|[\r\]])error: (.*)$", re.MULTILINE)  # a bar may stand before it on the line
TROUBLE = re.compile(rb"(?:^|[\r\]])(?:error: |Traceback )", re.MULTILINE)
LOST_RANK = re.compile(rb"failed \(exitcode: (?P<code>-?\d+)\) local_rank: (?P<rank>\d+)")
FAILED_RANK = re.compile(rb"rank +: (?P<rank>\d+) \(local_rank: \d+\)\s+exitcode +: (?P<code>-?\d+)")
GLOO_NOISE = re.compile(
    r"\[[^\]\s]*\.(?:cc|h):\d+\] |[.,]? *(?:This may indicate .*|Please check logs .*|\.\.\.GLHF!.*)$"
)
METRICS = "metrics.jsonl"  # the ranks' first file


class RanksFailedError(RuntimeError):
    """Ranks that were started did not come to their end; the message names the one to blame."""


class Outcome(NamedTuple):
    """Exit code (0; 2 for bad input; else 1) and, when it is not 0, the line that says why, with the rank."""

    code: int
    error: str


def launch(*runs: Run, watch: Callable[[], None] | None = None) -> Outcome:
    """Run every rank to its end, several runs in turns on the same ranks (`flashcp/train/turns.py`).

    What the ranks say goes to ranks.log in the first run's `out`; without `watch` also to standard error.
    watch: called a few times a second while the ranks work, and once after. Bad input that the ranks find before
    the first step leaves nothing in any `out`. parallel.attention=triton on a CPU runs in Triton's interpreter, which
    `rank_environment` turns on. Raises ValueError when `out` cannot be written.
    """
    folders = [Path(run.config.out) for run in runs]
    made = list(dict.fromkeys(folder for out in folders for folder in (out, *out.parents) if not folder.exists()))
    configs, log = [out / "config.json" for out in folders], folders[0] / "ranks.log"
    for run, config in zip(runs, configs, strict=True):
        try:
            config.parent.mkdir(parents=True, exist_ok=True)
            write_json(config, dataclasses.asdict(run.config))
            log.write_bytes(b"")
        except OSError as error:
            where = str(config.parent)
            raise ValueError(f"out={where!r}: cannot be written ({error.strerror}: {error.filename})") from error
    arguments = ["-m", "flashcp.train", *map(str, configs)]
    first = runs[0]
    outcome = start_ranks(arguments, first.world_size, first.threads, log, rank_environment(first.config), watch)
    if outcome.code == BAD_INPUT and not any((out / METRICS).exists() for out in folders):  # before the first step
        leave_no_trace([*configs, log], sorted(made, key=lambda folder: -len(folder.parts)))
    return outcome


def rank_environment(config: TrainConfig) -> dict[str, str]:
    """What the ranks of a run need in their environment before Python starts.

    Triton's kernels run on a CPU only in its interpreter, and Triton looks for TRITON_INTERPRET when it is imported:
    set exactly where the configuration says parallel.attention=triton and the run is on a CPU.
    """
    device = config.loop.device
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    return {"TRITON_INTERPRET": "1"} if config.parallel.attention == "triton" and on_cpu else {}


def start_ranks(
    arguments: Sequence[str],
    world_size: int,
    threads: int,
    log: Path,
    environment: Mapping[str, str] | None = None,
    watch: Callable[[], None] | None = None,
) -> Outcome:
    """Run `python ARGUMENTS` as every rank of a run on this machine, to its end; what they say goes to `log`.

    threads: of each rank. environment: beside this process's. watch: as for `launch`.
    """
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    command = [sys.executable, *(ranks if world_size > 1 else []), *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads), **(environment or {})}
    with log.open("wb") as written, log.open("rb") as said:
        look = watch or Echo(said)
        process = subprocess.Popen(command, env=variables, stdout=written, stderr=subprocess.STDOUT)
        try:
            while not _ended(process):
                look()
        finally:
            process.terminate()  # interrupted or stopped: the launcher stops its ranks; ended: does nothing
            process.wait()
        look()
    return Outcome(0, "") if process.returncode == 0 else diagnose(log, process.returncode)


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
    # The launcher's line at the moment of the loss has the number on its node, which is the rank where one node is all.
    ended = ended or {int(found["rank"]): int(found["code"]) for found in LOST_RANK.finditer(text)}
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
