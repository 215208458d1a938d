"""What can be found out without a GPU: that every part imports, every kernel compiles, and what there is to measure."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import triton

from flashcp.experiments.bench.tune_attention import Kernel, compile_all, compilers, fit, shipped
from flashcp.experiments.campaign.part import PARTS, load
from flashcp.kernels.ahead import TRANSFERS, Build, build, build_hopper, build_hopper_backward, build_transfer
from flashcp.kernels.tuning import DTYPES, HEAD_DIMS, TABLE, Pass, table_dim

ARCH = "sm_90"


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
