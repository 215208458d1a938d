"""Training runs: what decides one, starting its ranks, and telling in one line why they failed."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from flashcp.experiments.folders import leave_no_trace
from flashcp.experiments.sweep.results import REFERENCE, digest
from flashcp.train.config import TrainConfig
from flashcp.train.lock import check_free
from flashcp.train.parallel import ExchangeConfig
from flashcp.train.summary import write_json

BAD_INPUT = 2
COMPLAINT = re.compile(rb"(?:^|[\r\]])error: (.*)$", re.MULTILINE)  # a bar may stand before it on the line
TROUBLE = re.compile(rb"(?:^|[\r\]])(?:error: |Traceback )", re.MULTILINE)
LOST_RANK = re.compile(rb"failed \(exitcode: (?P<code>-?\d+)\) local_rank: (?P<rank>\d+)")
FAILED_RANK = re.compile(rb"rank +: (?P<rank>\d+) \(local_rank: \d+\)\s+exitcode +: (?P<code>-?\d+)")
GLOO_NOISE = re.compile(
    r"\[[^\]\s]*\.(?:cc|h):\d+\] |[.,]? *(?:This may indicate .*|Please check logs .*|\.\.\.GLHF!.*)$"
)
SILENT_RANK = re.compile(rb": rank (\d+) has been silent for ")
PR_SET_PDEATHSIG = 1  # of prctl, in linux/prctl.h
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PATIENCE_S = 10.0
"""How long others may go on when one has failed: time to name it."""
METRICS = "metrics.jsonl"  # the ranks' first file


class RanksFailedError(RuntimeError):
    """Ranks that were started did not come to their end; the message names the one to blame."""


class Outcome(NamedTuple):
    """Exit code (0; 2 for bad input; else 1) and, when it is not 0, the line that says why, with the rank."""

    code: int
    error: str


@dataclass(frozen=True)
class Run:
    """One training run: what `launch` starts.

    case: the work that providers are compared on, in short. provider: the method, as tables name it, or the overlap
    where levels of overlap are compared on one method. threads: of each rank. max_restarts: how often all ranks start
    anew, from the latest checkpoint, when one has failed.
    """

    case: str
    provider: str
    world_size: int
    threads: int
    config: TrainConfig
    max_restarts: int = 0

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def digest(self) -> str:
        """8 hex digits of everything that decides the run's numbers: two equal ones need no second run."""
        config = dataclasses.asdict(self.config)
        for name in ("out", "tracker", "checkpoint"):
            del config[name]
        del config["loop"]["progress"]
        return digest({"world_size": self.world_size, "threads": self.threads, "config": config})

    def alone(self) -> Run:
        """The same packs trained on by one process."""
        parallel = dataclasses.replace(self.config.parallel, overlap="auto", transport="auto", head_ranks=1, cluster="")
        one = dataclasses.replace(
            self.config,
            data_parallel=1,
            sharding={"name": "contiguous"},
            exchange=ExchangeConfig("exact"),
            parallel=parallel,
        )
        case = self.case.replace(f"-n{self.world_size}", "-n1", 1)
        return Run(case, REFERENCE, 1, self.threads, one)

    def placed(self, folder: str, group: str, tags: Sequence[str]) -> Run:
        """The same run writing to a folder, tracked under a group with a name of its own."""
        told = self.config.tracker
        name = told.name or f"{self.provider}-{self.case}"
        tracker = dataclasses.replace(told, group=told.group or group, name=name, tags=[*told.tags, *tags])
        return dataclasses.replace(self, config=dataclasses.replace(self.config, out=folder, tracker=tracker))


def launch(*runs: Run, watch: Callable[[], None] | None = None) -> Outcome:
    """Run every rank to its end, several runs in turns on the same ranks (`flashcp/train/run.py`).

    What the ranks say goes to ranks.log in the first run's `out`; without `watch` also to standard error.
    watch: called a few times a second while the ranks work, and once after. Bad input that the ranks find before
    the first step leaves nothing in any `out`. parallel.attention=triton on a CPU runs in Triton's interpreter, which
    `rank_environment` turns on. Raises ValueError when `out` cannot be written.
    """
    first, log = runs[0], runs[0].out / "ranks.log"
    made = list(dict.fromkeys(place for run in runs for place in (run.out, *run.out.parents) if not place.exists()))
    configs = [run.out / "config.json" for run in runs]
    for run, config in zip(runs, configs, strict=True):
        check_free(run.out)
        try:
            run.out.mkdir(parents=True, exist_ok=True)
            write_json(config, dataclasses.asdict(run.config))
            log.write_bytes(b"")
        except OSError as error:
            why = f"cannot be written ({error.strerror}: {error.filename})"
            raise ValueError(f"out={str(run.out)!r}: {why}") from error
    arguments = ["-m", "flashcp.train", *map(str, configs)]
    environment, restarts = rank_environment(first.config), first.max_restarts
    outcome = start_ranks(arguments, first.world_size, first.threads, log, environment, watch, restarts)
    if outcome.code == BAD_INPUT and not any((run.out / METRICS).exists() for run in runs):  # before the first step
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
    max_restarts: int = 0,
) -> Outcome:
    """Run `python ARGUMENTS` as every rank of a run on this machine, to its end; what they say goes to `log`.

    threads: of each rank. environment: beside this process's. watch: as for `launch`. max_restarts: as for `Run`.
    """
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    ranks.append(f"--max-restarts={max_restarts}")
    command = [sys.executable, *(ranks if world_size > 1 or max_restarts else []), *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads), **(environment or {})}
    log.touch()
    with log.open("rb") as said:
        return side_by_side([command], variables, log, watch or Echo(said))


def side_by_side(
    commands: Sequence[Sequence[str]], environment: Mapping[str, str], log: Path, watch: Callable[[], None]
) -> Outcome:
    """Run commands together to their end; what they say goes to `log`. Where one fails the others are stopped soon."""
    with log.open("wb") as written:
        processes: list[subprocess.Popen[bytes]] = []
        failed_at = math.inf
        try:
            for command in commands:  # here, for one that is interrupted in between leaves none behind
                processes.append(
                    subprocess.Popen(
                        command,
                        env=environment,
                        stdout=written,
                        stderr=subprocess.STDOUT,
                        preexec_fn=_ends_with_its_parent,
                    )
                )
            while working := [process for process in processes if process.poll() is None]:
                with suppress(subprocess.TimeoutExpired):
                    working[0].wait(timeout=0.2)
                watch()
                if any(process.returncode for process in processes):
                    failed_at = min(failed_at, time.monotonic())
                if time.monotonic() > failed_at + PATIENCE_S:
                    break
        finally:
            for process in processes:
                process.terminate()  # interrupted or stopped: a launcher stops its ranks; ended: does nothing
            for process in processes:
                process.wait()
    watch()
    code = next((process.returncode for process in processes if process.returncode), 0)
    return diagnose(log, code) if code else Outcome(0, "")


def _ends_with_its_parent() -> None:
    """In a launcher before it starts: where this process is killed, the system terminates it. Linux alone can."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


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


def diagnose(log: Path, code: int) -> Outcome:
    """Why a run failed, from what its ranks and their launcher said.

    A rank that a signal ended comes first: the others complain only of a connection that it closed.
    """
    text = log.read_bytes()
    listed, lost = (
        {int(found["rank"]): int(found["code"]) for found in pattern.finditer(text)}
        for pattern in (FAILED_RANK, LOST_RANK)
    )
    # The launcher's line at the moment of the loss has the number on its node, which is the rank where one node is all.
    ended = {rank: status for rank, status in listed.items() if status != -signal.SIGTERM} or lost  # its launcher's
    complaints = [found[1].decode(errors="replace") for found in COMPLAINT.finditer(text)]
    heard = {line.split()[1] for line in complaints if line.startswith("rank ")}
    heard |= {found[1].decode() for found in SILENT_RANK.finditer(text)}  # and were killed for it
    silent = [rank for rank, status in ended.items() if status < 0 and str(rank) not in heard]
    if complaints and not silent:
        line = " ".join(GLOO_NOISE.sub("", complaints[0]).split())
        return Outcome(1 if line.startswith("rank ") else BAD_INPUT, line)
    who = "the run"
    if ended:
        rank = min(silent or ended)
        who, code = f"rank {rank}:", ended[rank]
    name = f" ({signal.Signals(-code).name})" if -code in set(signal.Signals) else ""
    return Outcome(1, f"{who} ended with exit code {code}{name}; see {log}")
