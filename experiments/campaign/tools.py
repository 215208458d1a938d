"""One small call under the vendor's tools, where these are: ncu for counters, compute-sanitizer for faults."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence

from flashcp.experiments.campaign.part import Case, Turn
from flashcp.experiments.sweep.results import Failure, Number

__all__ = ["NCU", "SANITIZER", "case_of", "counters", "profile", "sanitize"]

NCU, SANITIZER = "ncu", "compute-sanitizer"
CALL = (sys.executable, "-m", "flashcp.experiments.campaign.one_call")
LIMIT_S = 75
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats")
PROFILE = (
    *(NCU, "--clock-control", "none", "--csv", "--kernel-name", r"regex:(forward|backward_kv|backward_q)_kernel"),
    *(word for section in SECTIONS for word in ("--section", section)),
)
CHECK = (SANITIZER, "--tool", "memcheck", "--error-exitcode", "9")


def case_of(tool: str) -> Case:
    """Its case, which takes no time where it is not installed."""
    return Case(tool, 30 if shutil.which(tool) else 0.1, LIMIT_S + 15)


def profile(turn: Turn) -> Iterator[Number | Failure]:
    """What ncu's sections tell of the three kernels, on one document of 8K."""
    if not _there(NCU):
        return
    code, text = _run(PROFILE, ["--tokens", "300" if turn.small else "8192"], turn)
    found = list(counters(text))
    yield from found
    if code or not found:
        yield Failure(NCU, _last_line(text) or f"ended with code {code}")


def sanitize(turn: Turn) -> Iterator[Number | Failure]:
    """Whether memcheck finds reads and writes outside of what was allocated, on a few short documents."""
    if not _there(SANITIZER):
        return
    code, text = _run(CHECK, ["--tokens", "300"], turn)
    if code:
        yield Failure(SANITIZER, _last_line(text) or f"ended with code {code}")
    else:
        yield Number(SANITIZER, "memcheck_errors", "errors", None, 0.0, None)


def counters(text: str) -> Iterator[Number]:
    """The numbers of ncu's CSV, each by its kernel and name. Lines before the head of the table are the program's."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    for row in csv.DictReader(lines[start:]):
        try:
            value = float((row.get("Metric Value") or "").replace(",", ""))
        except ValueError:
            continue
        if value >= 0:
            yield Number(row["Kernel Name"].split("(")[0], row["Metric Name"], row["Metric Unit"], None, value, None)


def _there(tool: str) -> bool:
    """Whether it is installed; a line on standard error where it is not."""
    found = shutil.which(tool) is not None
    if not found:
        print(f"{tool}: not on the PATH, nothing measured", file=sys.stderr)
    return found


def _run(tool: Sequence[str], arguments: Sequence[str], turn: Turn) -> tuple[int, str]:
    """Exit code and output of a call under a tool; the output is kept beside the rows."""
    command = [*tool, *CALL, *arguments]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S)
    (turn.folder / f"{tool[0]}.txt").write_text(run.stdout, encoding="utf-8")
    return run.returncode, run.stdout


def _last_line(text: str) -> str:
    """What a tool says last, which is its summary."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
