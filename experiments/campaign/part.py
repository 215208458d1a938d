"""What a part of the campaign is, where each is, and the case that any may have: a call under the vendor's tools."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple, cast

import torch

from flashcp.attention import varlen_attention
from flashcp.experiments.sweep.results import Failure, Number

HERE = "flashcp.experiments"
PARTS = {
    "correct": f"{HERE}.campaign.correct:PART",
    "attention": f"{HERE}.bench.attention:PART",
    "overlap": f"{HERE}.campaign.machine:OVERLAP",
    "tune": f"{HERE}.bench.tune_attention:PART",
    "calibrate": f"{HERE}.campaign.machine:CALIBRATE",
    "hybrid": f"{HERE}.campaign.machine:HYBRID",
}
"""Modules and what they call it, by name, the most valuable first."""


class Case(NamedTuple):
    """One thing to measure. expected_s: about how long it takes. limit_s: after so long it counts as hanging."""

    label: str
    expected_s: float
    limit_s: float


@dataclass(frozen=True)
class Turn:
    """How a case is measured. small: to try the code, not to measure. folder: for what is written beside the rows.

    left_out: providers that hung at this case before. seconds: that are left of the part. begin: is told whose turn
    it is, so that a hang is put down to them.
    """

    device: torch.device
    folder: Path
    seconds: float
    small: bool = False
    left_out: frozenset[str] = frozenset()
    begin: Callable[[str], None] = lambda provider: None


class Part(NamedTuple):
    """about: what it brings home. minutes: its share of a sitting. cases: what there is to measure, or what there is in
    small, the most valuable first. measure: the case of a label. kind: as rows say it."""

    about: str
    minutes: float
    cases: Callable[[bool], Sequence[Case]]
    measure: Callable[[str, Turn], Iterator[Number | Failure]]
    kind: str = "measured"


def load(place: str) -> Part:
    """The part at `module:NAME`."""
    return cast(Part, resolve_name(place))


# --- a case of any part: one small call under the vendor's tools, where these are; ncu counts, compute-sanitizer finds
# faults

NCU, SANITIZER = "ncu", "compute-sanitizer"
LIMIT_S = 75
SMALL = 300
KERNELS = "regex:(forward|backward_kv|backward_q)_kernel"
SECTIONS = "--section SpeedOfLight --section LaunchStats --section Occupancy --section WarpStateStats"
TOOLS = {
    NCU: (8192, f"--clock-control none --csv --kernel-name {KERNELS} {SECTIONS}"),
    SANITIZER: (SMALL, "--tool memcheck --error-exitcode 9"),
}
"""Tokens of the call, and the words before it."""


def case_of(tool: str) -> Case:
    """Its case, which takes no time where it is not installed."""
    return Case(tool, 30 if shutil.which(tool) else 0.1, LIMIT_S + 15)


def under(tool: str, turn: Turn) -> Iterator[Number | Failure]:
    """What ncu's sections tell of the three kernels, or whether memcheck finds reads and writes outside of what was
    allocated; where the tool is not installed, a line on standard error. Its output is kept beside the rows."""
    if not shutil.which(tool):
        print(f"{tool}: not on the PATH, nothing measured", file=sys.stderr)
        return
    tokens, options = TOOLS[tool]
    call = f"from flashcp.experiments.campaign import part; part.one_call({SMALL if turn.small else tokens})"
    command = [tool, *options.split(), sys.executable, "-c", call]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S)
    (turn.folder / f"{tool}.txt").write_text(run.stdout, encoding="utf-8")
    found = list(counters(run.stdout))
    if tool == SANITIZER and not run.returncode:
        found = [Number(SANITIZER, "memcheck_errors", "errors", None, 0.0, None)]
    yield from found
    if run.returncode or not found:
        said = [line.strip() for line in run.stdout.splitlines() if line.strip()]  # the summary comes last
        yield Failure(tool, said[-1] if said else f"ended with code {run.returncode}")


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


def one_call(tokens: int) -> None:
    """Forward and backward of tokens in three documents, one of them long; once to warm up and once more."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths = [tokens - 8, 1, 7]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(tokens, 4, 128, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    for _ in range(2):
        out = varlen_attention(q, k, v, lengths)
        torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    if device.type == "cuda":
        torch.cuda.synchronize()
