"""Runs a part in a process that it watches: what hangs or dies costs its own row, never another's.

What goes along the line between the two: down, a case's label and what a `Turn` says of it, None at the end; up, the
device's name, then for each case providers whose turn it is, what was found, and None; or a `LostError`.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Collection, Iterator
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flashcp.experiments.campaign.part import Case, Turn, load
from flashcp.experiments.sweep.results import Failure, Number, Row, check_device, reason, to_row, write_rows

START_S = 120.0  # a process imports torch and finds its device within this
END_S = 5.0
TRIES = 4  # of one case: each time without those who hung or took the device with them
LOST_IN_A_ROW = 3  # cases that come to nothing one after another, their process dead: the machine is no good


class PartResult(NamedTuple):
    """rows: failures among them. left_out: cases for which there was no time. seconds: it took."""

    rows: list[Row]
    failures: int
    left_out: int
    seconds: float

    def line(self, name: str) -> str:
        """How the part closes."""
        late = f", {self.left_out} cases left out for want of time" if self.left_out else ""
        return f"{name}: {len(self.rows)} rows, {self.failures} failures{late}, {self.seconds:.0f} s"


class LostError(Exception):
    """The measuring process hung or died, or its device takes no more work. Its text is the reason."""


def run_part(
    place: str, folder: Path, seconds: float, *, small: bool = False, of_commit: str = "", cases: str = ""
) -> PartResult:
    """Measure a part's cases, for so many seconds at most; its rows are in `folder`, rewritten after every case.

    place: see `part.load`. cases: only those whose label holds this text. Progress is said on standard error.
    """
    part = load(place)
    chosen = [case for case in part.cases(small) if cases in case.label]
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    rows: list[Row] = []
    late = lost_in_a_row = 0
    with closing(_Watched(place, folder, small, began + seconds)) as watched:
        for number, case in enumerate(chosen, start=1):
            started, given_up = time.monotonic(), lost_in_a_row == LOST_IN_A_ROW
            if given_up or began + seconds - started < min(case.expected_s, case.limit_s):
                _say(f"{case.label}: left out, {'the processes before it died' if given_up else 'the time is over'}")
                late += 1
                continue
            found, died = watched.measure(case)
            failures = [one for one in found if isinstance(one, Failure)]
            lost_in_a_row = lost_in_a_row + 1 if died and failures == found else 0
            rows += [to_row(case.label, one, watched.device, part.kind, of_commit) for one in found]
            write_rows(folder, rows)
            for one in failures:
                _say(f"{case.label}: {one.provider or 'all'} failed: {one.reason}")
            _say(f"{number}/{len(chosen)} {case.label}: {len(found)} rows, {time.monotonic() - started:.1f} s")
    return PartResult(rows, sum(row.metric == "failed" for row in rows), late, time.monotonic() - began)


class _Watched:
    """The measuring process, started when it is needed, ended when it hangs, and started again."""

    def __init__(self, place: str, folder: Path, small: bool, deadline: float) -> None:
        self.arguments, self.deadline = (place, folder, small), deadline
        self.device = "unknown"
        self._process: Any = None
        self._line: Connection

    def measure(self, case: Case) -> tuple[list[Number | Failure], bool]:
        """What came of a case, and whether its process died of it at last."""
        failures: list[Failure] = []
        for _ in range(TRIES):
            found: list[Number | Failure] = []
            provider = ""
            try:
                for message in self._messages(case, frozenset(one.provider for one in failures)):
                    if isinstance(message, str):
                        provider = message
                    else:
                        found.append(message)
                return [*failures, *found], False
            except LostError as lost:
                self.close(moment_s=0.0)
                failures += [one for one in found if isinstance(one, Failure)]
                if provider not in {one.provider for one in failures}:
                    failures.append(Failure(provider, str(lost)))
                if not provider or time.monotonic() + case.expected_s > self.deadline:
                    return [*(one for one in found if isinstance(one, Number)), *failures], True
        return [*failures], True

    def _messages(self, case: Case, left_out: Collection[str]) -> Iterator[Any]:
        """Providers, numbers and failures as they come. Raises LostError where the process hangs or dies."""
        if self._process is None:
            self._start()
        limit = time.monotonic() + case.limit_s
        try:
            self._line.send((case.label, self.deadline - time.monotonic(), left_out))
            while (message := self._next(min(limit, self.deadline))) is not None:
                yield message
        except TimeoutError:
            over = f"no end within {case.limit_s:g} s" if time.monotonic() >= limit else "the part's time was over"
            raise LostError(over) from None
        except (EOFError, OSError):
            self._process.join(END_S)
            raise LostError(f"its process ended with code {self._process.exitcode}") from None

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._line, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(*self.arguments, theirs))
        self._process.start()
        theirs.close()
        try:
            self.device = self._next(time.monotonic() + START_S)
        except (TimeoutError, EOFError, OSError) as error:
            raise LostError(f"no process to measure in: {type(error).__name__}") from None

    def _next(self, until: float) -> Any:
        """The next message. Raises TimeoutError where none comes in time, EOFError where the process is gone."""
        if not self._line.poll(max(0.0, until - time.monotonic())):
            raise TimeoutError
        message = self._line.recv()
        if isinstance(message, LostError):
            raise message
        return message

    def close(self, moment_s: float = END_S) -> None:
        """End the process and all that it started, given a moment to do so itself."""
        if self._process is None:
            return
        with suppress(OSError):
            if moment_s:
                self._line.send(None)
                self._process.join(moment_s)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join(10)
        self._line.close()
        self._process = None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def serve(place: str, folder: Path, small: bool, line: Connection) -> None:
    """The process that measures: what comes along the line, until nothing does. It may hang or die at any case."""
    os.setpgrp()  # so that all that it starts can be ended with it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    part = load(place)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    line.send(torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")
    provider = ""

    def begin(name: str) -> None:
        nonlocal provider
        provider = name
        line.send(name)

    while (task := line.recv()) is not None:
        label, seconds, left_out = task
        provider = ""
        try:
            for found in part.measure(label, Turn(device, folder, seconds, small, left_out, begin)):
                line.send(found)
        except Exception as failure:
            traceback.print_exc()
            line.send(Failure(provider, reason(failure)))
        gc.collect()
        try:
            check_device(device)
        except RuntimeError as lost:
            line.send(LostError(reason(lost)))
            return
        if device.type == "cuda":
            torch.cuda.empty_cache()
        line.send(None)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)
