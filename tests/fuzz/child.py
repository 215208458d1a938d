"""One parser in a process of its own: inputs until its time is over, then a line of JSON about it.

hypothesis mutates; what it aims at is the number of lines of ours that an input reaches.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings, target
from hypothesis.database import DirectoryBasedExampleDatabase, ExampleDatabase

from tests.checkout import ROOT
from tests.fuzz.mutations import spoiled
from tests.fuzz.parsers import Parser, call, parsers

A_CALL_S = 10.0  # with every line traced, four times what it takes without
MOST_BYTES = 1 << 30
ROUND = 100
KIB = 1024


class TooLong(Exception):
    """An input took more than A_CALL_S of processor time."""


@contextmanager
def counted(lines: set[tuple[str, int]]) -> Iterator[None]:
    """Collects the lines of ours that run."""

    def of_line(frame: FrameType, event: str, _: Any) -> Any:
        lines.add((frame.f_code.co_filename, frame.f_lineno))
        return of_line

    def of_call(frame: FrameType, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        return of_line if file.startswith(str(ROOT)) and "site-packages" not in file else None

    before = sys.gettrace()
    sys.settrace(of_call)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def timed() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLong(f"more than {A_CALL_S} s")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, A_CALL_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def fuzz(parser: Parser, seconds: float, database: ExampleDatabase | None) -> dict[str, Any]:
    """At least one input is parsed; without a database always the same ones.

    inputs: how many were. lines: of ours that they reached. failure: what the smallest input that is not parsed as
    documented did, and that input; empty where there is none. mib: by which memory grew.
    """
    reached: set[tuple[str, int]] = set()
    found: dict[str, Any] = {"parser": parser.name, "inputs": 0, "failure": "", "input": ""}
    begun, before = time.monotonic(), _peak_bytes()

    def parse(content: bytes) -> None:
        if found["inputs"] and time.monotonic() - begun > seconds:  # the first one, however slow hypothesis begins
            return
        found["inputs"] += 1
        lines: set[tuple[str, int]] = set()
        try:
            with tempfile.TemporaryDirectory() as folder, timed(), counted(lines):
                call(parser, content, Path(folder))
        except BaseException as error:
            found["input"] = repr(content)[:1000]
            found["failure"] = "".join(traceback.format_exception_only(error)).strip()[:500]
            raise
        reached.update(lines)
        target(float(len(lines)), label="lines")

    phases = (Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink)
    patient = settings(max_examples=ROUND, deadline=None, database=database, phases=phases,
                       suppress_health_check=list(HealthCheck), print_blob=False)  # fmt: skip
    parse.__qualname__ = f"fuzz {parser.name}"  # by which the database knows it
    run = patient(given(spoiled(parser.seeds))(parse))
    rounds = count()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while not found["inputs"] or (time.monotonic() - begun < seconds and not found["failure"]):
            try:
                (seed(next(rounds))(run) if database is None else run)()
            except BaseException:
                if not found["failure"]:
                    raise
    return {**found, "lines": len(reached), "mib": round((_peak_bytes() - before) / KIB / KIB)}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB


def main(name: str, seconds: float, database: str) -> None:
    parser = next(one for one in parsers() if one.name == name)
    with tempfile.TemporaryDirectory() as folder:
        call(parser, parser.seeds[0], Path(folder))  # what is loaded late is there
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MOST_BYTES, resource.RLIM_INFINITY))
    kept = DirectoryBasedExampleDatabase(database) if database else None
    print(json.dumps(fuzz(parser, seconds, kept)))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3])
