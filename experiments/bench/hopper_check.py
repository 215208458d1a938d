"""The Hopper candidate in processes of their own: what fails or hangs there costs the benchmark a line and a case.

`python -m flashcp.experiments.bench.hopper_check FIRST` computes the cases of the attention benchmark from FIRST on
with the portable kernels and with `hopper_forward.py`, says which one it begins and which ones agree, and ends at the
first that does not: a device that failed may fail ever after. `passed` starts another one behind it. The receive
buffer goes on behind its last row as NaN. Which waits and arrivals a launch makes follows from the tables alone, so a
case that came through once is launched again with the same ones.
"""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import IO

import torch

from flashcp.experiments.bench.accuracy import LARGEST_ERROR, relative_error
from flashcp.experiments.bench.attention_cases import Case, Forward, Tensors, all_cases, make_tensors, ours
from flashcp.kernels.interface import KV

__all__ = ["candidate", "main", "passed"]

LIMIT_S = 60.0  # of all processes together
CASE_S = 20.0  # of a case; one of other head counts compiles again
START_S = 30.0  # of a process, until its first case is done: imports and compilers
MOST_FAILURES = 3  # one behind the other: the candidate is broken, or the machine


def candidate(case: Case, x: Tensors) -> Forward:
    """The candidate on a case, forward only."""
    from flashcp.experiments.bench.hopper_forward import prepare

    q, k, v, received = (y.detach() for y in (x.q, x.k, x.v, x.received))
    forward = prepare(q, KV(k, v), KV(*received.unbind(1)), case.schedule, case.head_dim**-0.5)
    return lambda: forward()[0]


@cache
def passed(limit_s: float = LIMIT_S) -> frozenset[str]:
    """Labels of the cases that came through, whatever became of the others: those are told on standard error."""
    deadline, labels, first, failures = time.monotonic() + limit_s, set[str](), 0, 0
    while True:
        came_through, bad, why = _stretch(first, deadline)
        labels |= came_through
        if why:
            print(f"gluon left out{f' of {bad[1]}' if bad else ''}: {why}", file=sys.stderr)
        failures = 1 if came_through else failures + 1
        if bad is None:
            return frozenset(labels)
        if time.monotonic() > deadline or failures == MOST_FAILURES:
            print(f"gluon left out of all cases behind {bad[1]}", file=sys.stderr)
            return frozenset(labels)
        first = bad[0] + 1


def _stretch(first: int, deadline: float) -> tuple[set[str], tuple[int, str] | None, str]:
    """One process: what came through, the case at which it ended (None: at none), and why."""
    process = subprocess.Popen(_command(first), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines: queue.Queue[str] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
    reader.start()
    came_through: set[str] = set()
    at: tuple[int, str] | None = None
    try:
        while True:
            left = min(CASE_S if came_through else START_S, deadline - time.monotonic())
            try:
                word, *rest = lines.get(timeout=max(0.0, left)).split() or [""]
            except queue.Empty:
                return came_through, at, f"no answer within {max(0.0, left):.3g} s"
            if word == "begin":
                at = int(rest[0]), rest[1]
            elif word == "passed":
                came_through.add(rest[0])
            elif word == "failed":
                return came_through, at, " ".join(rest)
            elif not word:
                return came_through, *_end(process, at)
    finally:
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        reader.join(1)
        if not reader.is_alive():
            process.stdout.close()


def _end(process: subprocess.Popen[str], at: tuple[int, str] | None) -> tuple[tuple[int, str] | None, str]:
    """Where and why a process that says nothing more has ended; nowhere where all is well."""
    try:
        code = process.wait(10)
    except subprocess.TimeoutExpired:
        return at, "its process closed its output and did not end"
    if code == 0:
        return None, ""
    return at, f"its process ended by signal {-code}" if code < 0 else f"its process ended with code {code}"


def _command(first: int) -> list[str]:
    return [sys.executable, "-m", "flashcp.experiments.bench.hopper_check", str(first)]


def _read(output: IO[str], lines: queue.Queue[str]) -> None:
    """Line by line, and an empty one at the end."""
    for line in output:
        if line.strip():
            lines.put(line)
    lines.put("")


def main(arguments: list[str] | None = None) -> int:
    """Check case by case. Returns 0, or 1 behind a line that says why not."""
    (first,) = map(int, (sys.argv[1:] if arguments is None else arguments) or ["0"])
    if not torch.cuda.is_available():
        print("failed there is no CUDA device", flush=True)
        return 1
    for number, case in enumerate(all_cases()):
        if number < first:
            continue
        print("begin", number, case.label, flush=True)
        try:
            check(case)
        except Exception as failure:
            print("failed", (str(failure).splitlines() or [type(failure).__name__])[0], flush=True)
            return 1
        print("passed", case.label, flush=True)
    return 0


def check(case: Case) -> None:
    """Raises RuntimeError where the candidate differs from the portable kernels."""
    x = make_tensors(case, torch.bfloat16, torch.device("cuda"))
    behind = torch.full((128, *x.received.shape[1:]), torch.nan, dtype=x.received.dtype, device="cuda")
    longer = replace(x, received=torch.cat((x.received.detach(), behind)))
    difference = relative_error(candidate(case, longer)().detach(), ours(case, x)().detach())
    if not difference <= 2 * LARGEST_ERROR:
        raise RuntimeError(f"differs by {difference:.1e}")


if __name__ == "__main__":
    sys.exit(main())
