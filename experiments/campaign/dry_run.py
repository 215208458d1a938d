"""What can be found out without a GPU: that every part imports, every kernel compiles, and what there is to measure."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import triton

from flashcp.experiments.bench.tune_attention import Kernel, compile_all, compilers, fit, shipped
from flashcp.experiments.campaign.part import PARTS, load
from flashcp.kernels.ahead import TARGETS, TRANSFERS, Build, build, build_transfer, read
from flashcp.kernels.tuning import DTYPES, HEAD_DIMS, TABLE, Blocks, Pass, table_dim

__all__ = ["compile_candidate", "dry_run", "kernels"]

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
        print(f"{name}: {part.ABOUT}; {len(listed)} cases, some {minutes:.0f} min for all, share {part.MINUTES:g}")
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
                print(
                    f"  {kernel.name}: unfit, {found.registers} registers, {found.spilled_bytes} B spilled", flush=True
                )
    print(f"{len(wanted)} kernels: {refused} do not compile, {unfit} unfit")
    return int(refused > 0)


def kernels() -> Iterator[Kernel]:
    """Every kernel that a GPU of that architecture may be asked for: the table's, those under context parallelism, the
    transfers, the candidate."""
    yield from (kernel for kernel in shipped() if kernel.arch == ARCH)
    for head_dim, dtype, which in product(HEAD_DIMS, DTYPES, Pass):
        for blocks in dict.fromkeys(TABLE[ARCH, table_dim(head_dim), 4 if dtype == "float32" else 2, which]):
            yield _variant("parallel", which, head_dim, dtype, blocks, parallel=True)
            if which is Pass.FORWARD:
                yield _variant("fused", which, head_dim, dtype, blocks, parallel=True, fused=True)
    for name, head_dim, dtype in product(TRANSFERS, HEAD_DIMS, DTYPES):
        work = partial(build_transfer, name, ARCH, head_dim, dtype)
        yield Kernel(f"{ARCH} {head_dim} {dtype} {name}", ARCH, False, False, work)
    for head_dim, dtype, group in product((64, 128), ("bfloat16", "float16"), (1, 4)):
        work = partial(build_candidate, head_dim, dtype, group)
        yield Kernel(f"{ARCH} {head_dim} {dtype} candidate group {group}", ARCH, True, True, work)


def _variant(kind: str, which: Pass, head_dim: int, dtype: str, blocks: Blocks, **options: bool) -> Kernel:
    name = f"{ARCH} {head_dim} {dtype} {which.value} {blocks.block_m}x{blocks.block_n} {kind}"
    work: Any = partial(build, which, ARCH, head_dim, dtype, blocks, **options)
    return Kernel(name, ARCH, False, dtype != "float32", work)


def build_candidate(head_dim: int, dtype: str, group: int) -> Build:
    """What the candidate for Hopper takes."""
    return read(compile_candidate(head_dim, dtype, group), ARCH)


def compile_candidate(head_dim: int, dtype: str, group: int) -> triton.compiler.CompiledKernel:
    """Compile `hopper_forward.py`, the candidate for Hopper."""
    import torch
    from triton.experimental.gluon._runtime import GluonASTSource

    from flashcp.experiments.bench import hopper_forward

    kernel, element = hopper_forward.hopper_forward_kernel, {"bfloat16": "bf16", "float16": "fp16"}[dtype]
    layout = hopper_forward.block_layout(head_dim, getattr(torch, dtype))
    chosen = {"GROUP": group, "STAGES": hopper_forward.STAGES}
    types = dict.fromkeys(("table", "ranges", "reach"), "*i32") | {"lse": "*fp32", "scale": "fp32"}
    for name in ("k", "v", "k_received", "v_received"):
        types[name] = f"tensordesc<{element}[{hopper_forward.BLOCK_N}, 1, {head_dim}],{layout!r}>"
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in chosen:
            signature[name], constants[(index,)] = "constexpr", chosen[name]
        else:
            signature[name] = types.get(name, "i32" if name.endswith(("_row", "_head")) else f"*{element}")
            if not signature[name].startswith("tensordesc"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[ARCH], options=hopper_forward.OPTIONS)
