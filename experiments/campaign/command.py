"""The command line of the campaign."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from flashcp.experiments.campaign.dry_run import dry_run
from flashcp.experiments.campaign.part import PARTS, load
from flashcp.experiments.campaign.watch import run_part
from flashcp.experiments.folders import check_out

MINUTES = 9.0
DEVICE_S = 120  # for the first look at the device
ASK = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",  # streams that share a hardware queue would wait for one another
    "CUDA_MODULE_LOADING": "EAGER",  # a kernel loaded late waits for the GPU to be idle, and so do those behind it
    "GLOO_SOCKET_IFNAME": "lo",  # the machine may not resolve its own name
}
"""What the measuring processes get where nobody set it: they are read when CUDA and gloo start."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the parts that are named, or all. Returns 0; 1 where a part brought no number home; 2, with one line on
    standard error, for wrong arguments."""
    options = _parser().parse_args(arguments)
    parts = list(dict.fromkeys(options.parts))
    unknown = [name for name in parts if name not in PARTS]
    try:
        if unknown:
            raise ValueError(f"part {unknown[0]!r}: expected one of {', '.join(PARTS)}")
        if not 0 < options.minutes < float("inf"):
            raise ValueError(f"minutes={options.minutes}: expected a number > 0")
        if options.processes < 1:
            raise ValueError(f"processes={options.processes}: expected a whole number >= 1")
        chosen = [name for name in PARTS if name in parts] or list(PARTS)
        labels = [case.label for name in chosen for case in load(PARTS[name]).cases(options.small)]
        if not any(options.cases in label for label in labels):
            raise ValueError(f"cases={options.cases!r}: no case of {', '.join(chosen)} holds it; --dry-run lists them")
        if options.dry_run:
            return dry_run(chosen, options.processes, options.cases, options.small)
        return _sitting(chosen, options)
    except ValueError as error:
        print(f"campaign: {error}", file=sys.stderr)
        return 2


def _sitting(chosen: Sequence[str], options: argparse.Namespace) -> int:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    began = time.monotonic()
    device = _device()
    if not device and not options.small:
        raise ValueError("it measures a GPU, and torch sees none here; to try it anyway: --small")
    out = options.out or Path("outputs/campaign") / (re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") or "cpu")
    check_out(out)
    print(f"campaign on {device or 'a CPU'}, {options.minutes:g} minutes, rows in {out}", flush=True)
    empty = False
    for place, name in enumerate(chosen):
        part, *others = (load(PARTS[one]) for one in chosen[place:])
        left = began + 60 * options.minutes - time.monotonic()
        seconds = left * part.minutes / (part.minutes + sum(other.minutes for other in others))
        print(f"{name}: {part.about}; at most {seconds:.0f} s", file=sys.stderr, flush=True)
        told = {"small": options.small, "of_commit": options.commit, "cases": options.cases}
        result = run_part(PARTS[name], out / name, seconds, **told)
        empty |= len(result.rows) == result.failures
        print(result.line(name), flush=True)
    return int(empty)


def _device() -> str:
    """The GPU's name, empty where there is none; asked in another process, for this one must not hang."""
    try:
        asked = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, timeout=DEVICE_S)
    except subprocess.TimeoutExpired:
        raise ValueError(f"the GPU did not answer within {DEVICE_S} s") from None
    if asked.returncode:
        raise ValueError(f"the GPU cannot be used: {(asked.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return asked.stdout.strip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flashcp.experiments.campaign", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; none: all, in this order")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together (default: %(default)g)")
    parser.add_argument("--out", type=Path, default=None, help="folder (default: outputs/campaign/DEVICE)")
    parser.add_argument("--cases", default="", metavar="TEXT", help="only cases whose label holds this")
    parser.add_argument("--commit", default="", help="of the code, where there is no git to ask")
    parser.add_argument("--small", action="store_true", help="tiny cases, on a CPU too: to try it, not to measure")
    parser.add_argument("--dry-run", action="store_true", help="import and compile everything, list the cases; no GPU")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that compile in a dry run")
    return parser
