"""The command line of the campaign."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import triton

from flashcp.experiments.bench.tune_attention import Kernel, compile_all, compilers, fit, shipped
from flashcp.experiments.campaign.part import PARTS, load
from flashcp.experiments.campaign.watch import run_part
from flashcp.experiments.folders import check_out
from flashcp.kernels.ahead import TRANSFERS, Build, build, build_hopper, build_hopper_backward, build_transfer
from flashcp.kernels.tuning import DTYPES, HEAD_DIMS, TABLE, Pass, table_dim

MINUTES = 9.0
ARCH = "sm_90"
"""Of the kernels that a dry run compiles."""
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


# --- what can be found out without a GPU: that every part imports, every kernel compiles, what there is to measure


def dry_run(
    parts: Sequence[str],
    processes: int,
    cases: str = "",
    small: bool = False,
    chosen: Callable[[Kernel], bool] = lambda kernel: True,
) -> int:
    """Print cases, minutes and what the compiler refuses. Returns 0, or 1 where a kernel does not compile.

    cases: those whose label holds this. small: the small ones. chosen: of `kernels`, all of which compile otherwise.
    """
    for name in parts:
        part = load(PARTS[name])
        listed = [case for case in part.cases(small) if cases in case.label]
        minutes = sum(case.expected_s for case in listed) / 60
        print(f"{name}: {part.about}; {len(listed)} cases, some {minutes:.0f} min for all, share {part.minutes:g}")
        for case in listed:
            print(f"  {case.label:<44} {case.expected_s:4.0f} s, at most {case.limit_s:.0f}")
    wanted = [kernel for kernel in kernels() if chosen(kernel)]
    about = f"compiling {len(wanted)} kernels for {ARCH} with triton {triton.__version__}"
    print(f"{about}, a few seconds each on each of {processes} processes", flush=True)
    refused = unfit = 0
    with compilers(processes) as pool:
        for count, (kernel, found) in enumerate(zip(wanted, compile_all(wanted, pool), strict=True)):
            if count and count % 25 == 0:
                print(f"  {count} of {len(wanted)}", file=sys.stderr, flush=True)
            if not isinstance(found, Build):
                refused += 1
                print(f"  {kernel.name}: {found}", flush=True)
            elif not fit(found, kernel):
                unfit += 1
                told = f"{found.registers} registers, {found.spilled_bytes} B spilled"
                print(f"  {kernel.name}: unfit, {told}", flush=True)
    print(f"{len(wanted)} kernels: {refused} do not compile, {unfit} unfit")
    return int(refused > 0)


def kernels() -> Iterator[Kernel]:
    """Every kernel that a GPU of that architecture may be asked for: the table's, those under context parallelism, the
    transfers, the forward on Hopper."""
    yield from (kernel for kernel in shipped() if kernel.arch == ARCH)
    for head_dim, dtype, which in product(HEAD_DIMS, DTYPES, Pass):
        for blocks in dict.fromkeys(TABLE[ARCH, table_dim(head_dim), 4 if dtype == "float32" else 2, which]):
            for kind in ("parallel", "fused") if which is Pass.FORWARD else ("parallel",):
                name = f"{ARCH} {head_dim} {dtype} {which.value} {blocks.block_m}x{blocks.block_n} {kind}"
                work = partial(build, which, ARCH, head_dim, dtype, blocks, parallel=True, fused=kind == "fused")
                yield Kernel(name, ARCH, False, dtype != "float32", work)
    for name, head_dim, dtype in product(TRANSFERS, HEAD_DIMS, DTYPES):
        transfer = partial(build_transfer, name, ARCH, head_dim, dtype)
        yield Kernel(f"{ARCH} {head_dim} {dtype} {name}", ARCH, False, False, transfer)
    for head_dim, dtype, group, merge in product((64, 128), ("bfloat16", "float16"), (1, 4), (False, True)):
        hopper = partial(build_hopper, head_dim, dtype, group, merge)
        name = f"{ARCH} {head_dim} {dtype} hopper forward group {group}{' merge' if merge else ''}"
        yield Kernel(name, ARCH, True, True, hopper)
        backward = partial(build_hopper_backward, head_dim, dtype, group, merge)
        name = f"{ARCH} {head_dim} {dtype} hopper backward group {group}{' parallel' if merge else ''}"
        yield Kernel(name, ARCH, False, True, backward)


if __name__ == "__main__":  # a part's process imports this file too
    sys.exit(main())
