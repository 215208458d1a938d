"""Runs a part in a process that it watches: what hangs or dies costs its own row, never another's."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from flashcp.experiments.campaign.part import Case, load
from flashcp.experiments.campaign.worker import Begun, Done, Hello, Lost, Task, serve
from flashcp.experiments.sweep.results import Failure, Number, Row, to_row, write_rows

__all__ = ["PartResult", "run_part"]

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
    """The measuring process hung or died. Its text is the reason."""


def run_part(
    module: str, folder: Path, seconds: float, *, small: bool = False, of_commit: str = "", cases: str = ""
) -> PartResult:
    """Measure a part's cases, for so many seconds at most; its rows are in `folder`, rewritten after every case.

    cases: only those whose label holds this text. Progress is said on standard error.
    """
    part = load(module)
    chosen = [case for case in part.cases(small) if cases in case.label]
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    rows: list[Row] = []
    late = lost_in_a_row = 0
    with _Watched(module, folder, small, began + seconds) as watched:
        for number, case in enumerate(chosen, start=1):
            left = began + seconds - time.monotonic()
            if left < min(case.expected_s, case.limit_s) or lost_in_a_row == LOST_IN_A_ROW:
                why = "the time is over" if lost_in_a_row < LOST_IN_A_ROW else "the processes before it died"
                _say(f"{case.label}: left out, {why}")
                late += 1
                continue
            started = time.monotonic()
            found, died = watched.measure(case)
            lost_in_a_row = lost_in_a_row + 1 if died and all(isinstance(one, Failure) for one in found) else 0
            rows += [to_row(case.label, one, watched.device, part.KIND, of_commit) for one in found]
            write_rows(folder, rows)
            for one in found:
                if isinstance(one, Failure):
                    _say(f"{case.label}: {one.provider or 'all'} failed: {one.reason}")
            _say(f"{number}/{len(chosen)} {case.label}: {len(found)} rows, {time.monotonic() - started:.1f} s")
    failures = sum(row.metric == "failed" for row in rows)
    return PartResult(rows, failures, late, time.monotonic() - began)


class _Watched:
    """The measuring process, started when it is needed, ended when it hangs, and started again."""

    def __init__(self, module: str, folder: Path, small: bool, deadline: float) -> None:
        self.arguments, self.deadline = (module, folder, small), deadline
        self.device = "unknown"
        self._process: Any = None
        self._line: Connection

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            with suppress(OSError):
                self._line.send(None)  # it ends what it started itself, given a moment
                self._process.join(END_S)
        self._end()

    def measure(self, case: Case) -> tuple[list[Number | Failure], bool]:
        """What came of a case, and whether its process died of it at last."""
        failures: list[Number | Failure] = []
        left_out: frozenset[str] = frozenset()
        for _ in range(TRIES):
            found: list[Number | Failure] = []
            turn = [""]
            try:
                self._try(case, left_out, found, turn)
                return failures + found, False
            except LostError as lost:
                self._end()
                failures += [one for one in found if isinstance(one, Failure)]
                if turn[0] not in {one.provider for one in failures}:
                    failures.append(Failure(turn[0], str(lost)))
                if not turn[0] or time.monotonic() + case.expected_s > self.deadline:
                    return [one for one in found if isinstance(one, Number)] + failures, True
                left_out |= {one.provider for one in failures}
        return failures, True

    def _try(self, case: Case, left_out: Collection[str], found: list[Number | Failure], turn: list[str]) -> None:
        if self._process is None:
            self._start()
        limit = time.monotonic() + case.limit_s
        task = Task(case.label, frozenset(left_out), self.deadline - time.monotonic())
        try:
            self._line.send(task)
            while not isinstance(message := self._next(min(limit, self.deadline)), Done):
                if isinstance(message, Begun):
                    turn[0] = message.provider
                elif isinstance(message, Lost):
                    raise LostError(message.reason)
                else:
                    found.append(message)
        except TimeoutError:
            over = f"no end within {case.limit_s:g} s" if time.monotonic() >= limit else "the part's time was over"
            raise LostError(over) from None
        except (EOFError, OSError):
            self._process.join(5)
            raise LostError(f"its process ended with code {self._process.exitcode}") from None

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._line, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(*self.arguments, theirs))
        self._process.start()
        theirs.close()
        try:
            hello = self._next(time.monotonic() + START_S)
        except (TimeoutError, EOFError, OSError) as error:
            raise LostError(f"no process to measure in: {type(error).__name__}") from None
        assert isinstance(hello, Hello)
        self.device = hello.device

    def _next(self, until: float) -> Any:
        """The next message. Raises TimeoutError where none comes in time, EOFError where the process is gone."""
        if not self._line.poll(max(0.0, until - time.monotonic())):
            raise TimeoutError
        return self._line.recv()

    def _end(self) -> None:
        """End the process and all that it started."""
        if self._process is None:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join(10)
        self._line.close()
        self._process = None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
