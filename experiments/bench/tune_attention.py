"""Find block shapes for `kernels/tuning.py`.

    python -m flashcp.experiments.bench.tune_attention --arch sm_90 --head-dim 128 --pass backward_kv

Anywhere: compiles every candidate for the chip and lists those that spill nothing, fit its shared memory and use its
tensor cores. On a GPU of that architecture it also times them, on a long document and on short ones, and the fastest
of each belong into the table. `--table` compiles what the table ships, all of it, and fails if an entry is unfit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import compress, product
from typing import NamedTuple, cast

import torch
import triton
from torch import Tensor

from flashcp.attention import varlen_attention
from flashcp.experiments.bench.attention_cases import make_tensors, pack
from flashcp.experiments.bench.harness import Work, in_turns_ms, relative_error
from flashcp.experiments.campaign.part import Case, Part, Turn
from flashcp.experiments.sweep.results import Failure, Number, check_device, reason
from flashcp.kernels.ahead import TARGETS, Build, build, build_rows
from flashcp.kernels.backward_rows import ROWS
from flashcp.kernels.tuning import DTYPES, HEAD_DIMS, SHARED_BYTES, TABLE, Blocks, Pass, Tuning, architecture, table_dim

PACKS = {"long": [16_384], "short": [64] * 256}
SECONDS = 20.0  # for the candidates of one pack
LARGEST_DIFFERENCE = 2e-2  # of two kernels in bf16
HEAD = f"{'kernel':<58} {'registers':>9} {'spilled B':>9} {'shared B':>9} {'tensor-core':>11} {'async':>6}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if an entry of the table is unfit."""
    parser = argparse.ArgumentParser(prog="tune_attention", description=__doc__)
    parser.add_argument("--arch", choices=list(TARGETS), default="sm_90")
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--pass", dest="which", choices=[which.value for which in Pass], default="forward")
    parser.add_argument("--table", action="store_true", help="compile what the table ships for every architecture")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    print(f"triton {triton.__version__}\n{HEAD}")
    if options.table:
        fits = compiled(list(shipped()), options.processes)
        print(f"triton {triton.__version__}: {len(fits)} kernels, {fits.count(False)} unfit")
        return 0 if all(fits) else 1
    which, head_dim, device = Pass(options.which), options.head_dim, torch.device("cuda")
    candidates = list(grid(options.dtype))
    kernels = [tuned(which, options.arch, head_dim, options.dtype, blocks) for blocks in candidates]
    fitting = [*compress(candidates, compiled(kernels, options.processes))]
    if not torch.cuda.is_available() or architecture(device) != options.arch:
        print(f"not timed: that needs a GPU of {options.arch}")
        return 0
    for name, lengths in PACKS.items():
        work = timed_work(which, fitting, head_dim, getattr(torch, options.dtype), lengths, device)
        times = in_turns_ms(agreeing(work), device, SECONDS)
        for blocks, (low, median, high) in sorted(times.items(), key=lambda entry: entry[1][1]):
            print(f"{name}: {median:.3f} ms ({low:.3f} to {high:.3f}) {blocks}")
    return 0


class Kernel(NamedTuple):
    """One kernel for one chip. tight, cores: unfit if it spills, if it uses no tensor cores."""

    name: str
    arch: str
    tight: bool
    cores: bool
    build: Callable[[], Build]


def tuned(which: Pass, arch: str, head_dim: int, dtype: str, b: Blocks, group: int = 1, heads: int = 1) -> Kernel:
    """A pass with its blocks. group: query heads a KV head. heads: how many of them share a query tile."""
    name = f"{arch} {head_dim} {dtype} {which.value} {b.block_m}x{b.block_n} w{b.warps} s{b.stages} {b.precision}"
    half = dtype != "float32"
    work = partial(build, which, arch, head_dim, dtype, b, group, heads)
    name += (f" group {group}" if group > 1 else "") + (f", {heads} a tile" if heads > 1 else "")
    return Kernel(name, arch, half, half, work)


def shipped() -> Iterator[Kernel]:
    """Every kernel of the table, and the one that has no entry there, for every head_dim and dtype."""
    for arch, head_dim, dtype in product(TARGETS, HEAD_DIMS, DTYPES):
        for which in Pass:
            for blocks in dict.fromkeys(TABLE[arch, table_dim(head_dim), getattr(torch, dtype).itemsize, which]):
                yield tuned(which, arch, head_dim, dtype, blocks)
                if which is Pass.BACKWARD_KV:  # the only one that loops over the heads of a group
                    yield tuned(which, arch, head_dim, dtype, blocks, group=4)
            if which is not Pass.BACKWARD_KV:
                yield tuned(which, arch, head_dim, dtype, blocks, group=4, heads=4 if blocks.block_m >= 64 else 2)
        rows = partial(build_rows, arch, head_dim, dtype)
        yield Kernel(f"{arch} {head_dim} {dtype} backward_rows {ROWS}", arch, True, False, rows)


def grid(dtype: str) -> Iterator[Blocks]:
    """Candidates of a search."""
    rows, precisions = ((16, 32, 64), ("ieee", "tf32x3")) if dtype == "float32" else ((32, 64, 128), ("ieee",))
    for block_m, block_n, warps, stages, precision in product(rows, rows, (4, 8), (1, 2, 3), precisions):
        yield Blocks(block_m, block_n, warps, stages, precision)


def compiled(kernels: Sequence[Kernel], processes: int) -> list[bool]:
    """Compile, print a line each, tell which are fit."""
    with compilers(processes) as pool:
        fits = []
        for kernel, result in zip(kernels, compile_all(kernels, pool), strict=True):
            fits.append(isinstance(result, Build) and fit(result, kernel))
            if isinstance(result, Build):
                cores, unfit = result.wgmma + result.tcgen05 + result.mma, "" if fits[-1] else "  unfit"
                memory = f"{result.registers:>9} {result.spilled_bytes:>9} {result.shared_bytes:>9}"
                result = f"{memory} {cores:>11} {result.async_copies:>6}{unfit}"
            print(f"{kernel.name:<58} {result}", flush=True)
    return fits


def compilers(processes: int) -> ProcessPoolExecutor:
    """Processes that compile. They start anew: copies of one that uses a GPU could not be trusted."""
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))


def compile_all(kernels: Iterable[Kernel], pool: ProcessPoolExecutor) -> Iterator[Build | str]:
    """What the compiler made of each, in order, or a line why it made nothing."""
    return pool.map(_try, kernels)


def fit(found: Build, kernel: Kernel) -> bool:
    """Within the chip's shared memory, and as tight and fast as is asked for."""
    too_much = found.shared_bytes > SHARED_BYTES[kernel.arch] or (kernel.tight and found.spilled_bytes > 0)
    return not too_much and (not kernel.cores or found.wgmma + found.tcgen05 + found.mma > 0)


def _try(kernel: Kernel) -> Build | str:
    try:
        return kernel.build()
    except Exception as error:  # compilers fail in many ways; a candidate less
        return f"does not compile: {str(error).splitlines()[0][:80]}"


def timed_work(
    which: Pass,
    candidates: Sequence[Blocks],
    head_dim: int,
    dtype: torch.dtype,
    lengths: Sequence[int],
    device: torch.device,
) -> dict[str, Work]:
    """For each candidate, by its text, what runs the pass that uses it on a pack and returns its results.

    A backward is both passes: dK and dV, and dQ.
    """
    x = make_tensors(pack("", lengths, (16, 16), head_dim), dtype, device)

    def backward(out: Callable[[], Tensor]) -> object:
        return torch.autograd.grad(out(), x.leaves, x.grad, retain_graph=True)

    work: dict[str, Work] = {}
    for blocks in candidates:
        tuning = Tuning.from_text(f"{which.value}={blocks.to_text()}")
        forward = partial(varlen_attention, x.q, x.k, x.v, lengths, tuning=tuning)
        # A backward's forward runs when it is first asked for, and is kept.
        work[blocks.to_text()] = forward if which is Pass.FORWARD else partial(backward, cache(forward))
    return work


def agreeing(work: Mapping[str, Work]) -> dict[str, Work]:
    """Those that give what the first one gives; of the others it is said."""
    kept: dict[str, Work] = {}
    expected: tuple[Tensor, ...] = ()
    for name, one in work.items():
        found = results(one())
        expected = expected or found
        error = farthest(found, expected)
        if error <= LARGEST_DIFFERENCE:
            kept[name] = one
        else:
            print(f"{name} differs from the first by {error:.1e}: a wrong kernel is not timed")
    return kept


def results(found: object) -> tuple[Tensor, ...]:
    """The output, or the gradients, that `timed_work` came to."""
    return (found.detach(),) if isinstance(found, Tensor) else tuple(cast(tuple[Tensor, ...], found))


def farthest(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error of one kernel's results against another's."""
    return max(relative_error(value, other) for value, other in zip(found, expected, strict=True))


# --- a part of the campaign: the search for every head_dim that ships

BY_USE = (128, 64, 96, 80, 256, 32, 16)  # by how many models have them
DTYPE = "bfloat16"
CASE_S = 25.0  # of one pass on one pack, most of it compiling
FINALISTS = 5  # take turns with the table's own, after each was timed alone
ALONE_S, TURNS_S = 0.05, 1.0
SMALL = [30, 2]


def cases(small: bool) -> list[Case]:
    """Each pass on a long document and on short ones."""
    if small:
        return [Case(f"32_{which.value}_long", 20, 120) for which in (Pass.FORWARD, Pass.BACKWARD_Q)]
    labels = [f"{head_dim}_{which.value}_{pack}" for head_dim in BY_USE for pack in PACKS for which in Pass]
    return [Case(label, CASE_S, 4 * CASE_S) for label in labels]


def measure(label: str, turn: Turn) -> Iterator[Number | Failure]:
    """Milliseconds of every candidate that fits, and of the best in turns with the table's own."""
    head_dim_text, _, rest = label.partition("_")
    which_text, _, pack = rest.rpartition("_")
    head_dim, which = int(head_dim_text), Pass(which_text)
    arch = architecture(turn.device) if turn.device.type == "cuda" else "sm_90"
    until = time.monotonic() + min(CASE_S, turn.seconds) - 2 * TURNS_S
    dtype, lengths = getattr(torch, DTYPE), SMALL if turn.small else PACKS[pack]
    work = partial(timed_work, which, head_dim=head_dim, dtype=dtype, lengths=lengths, device=turn.device)
    of_table = TABLE[arch, table_dim(head_dim), dtype.itemsize, which][list(PACKS).index(pack)]
    alone: dict[Blocks, float] = {}
    expected: tuple[Tensor, ...] = ()
    for blocks, registers in _fitting(which, arch, head_dim, of_table, turn.small):
        name = blocks.to_text()
        if time.monotonic() > until:
            break
        if name in turn.left_out:
            continue
        yield Number(name, "registers", "registers", None, float(registers), None)
        turn.begin(name)
        try:
            (one,) = work([blocks]).values()
            found = results(one())
            expected = expected or found
            error = farthest(found, expected)
            if not error <= LARGEST_DIFFERENCE:
                raise RuntimeError(f"differs from {of_table.to_text()} by {error:.1e}: a wrong kernel is not timed")
            alone[blocks] = in_turns_ms({name: one}, turn.device, ALONE_S)[name][1]
        except Exception as failure:
            check_device(turn.device)
            yield Failure(name, reason(failure))
            continue
        yield Number(name, "alone_ms", "ms", None, alone[blocks], None)
    turn.begin("")
    best = sorted(alone, key=alone.__getitem__)[:FINALISTS]
    finalists = [blocks for blocks in dict.fromkeys([of_table, *best]) if blocks in alone]
    for name, spread in in_turns_ms(work(finalists), turn.device, TURNS_S).items():
        yield Number(name, "shipped_ms" if name == of_table.to_text() else "candidate_ms", "ms", *spread)


PART = Part("block shapes beside those of the table", 3.0, cases, measure)


def _fitting(which: Pass, arch: str, head_dim: int, of_table: Blocks, small: bool) -> Iterator[tuple[Blocks, int]]:
    """The table's blocks, then candidates that spill nothing, fit the chip and use its tensor cores, as they are
    compiled, the largest first: of those most win. With the registers that they take."""
    by_size = sorted(grid(DTYPE), key=lambda blocks: -blocks.block_m * blocks.block_n)
    candidates = list(dict.fromkeys([of_table, *by_size[:: 20 if small else 1]]))
    kernels = [tuned(which, arch, head_dim, DTYPE, blocks) for blocks in candidates]
    for blocks, kernel, one in zip(candidates, kernels, compile_all(kernels, _pool()), strict=True):
        if isinstance(one, Build) and (blocks == of_table or fit(one, kernel)):
            yield blocks, one.registers


@cache
def _pool() -> ProcessPoolExecutor:
    return compilers(max(1, (os.cpu_count() or 2) - 2))


if __name__ == "__main__":
    sys.exit(main())
