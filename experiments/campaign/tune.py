"""The search for block shapes (`tune_attention.py`), for every head_dim that ships."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from typing import cast

import torch
from torch import Tensor

from flashcp.experiments.bench.harness import in_turns_ms, relative_error
from flashcp.experiments.bench.tune_attention import PACKS, compile_all, compilers, fit, grid, timed_work, tuned
from flashcp.experiments.campaign.part import Case, Part, Turn
from flashcp.experiments.sweep.results import Failure, Number, check_device, reason
from flashcp.kernels.ahead import Build
from flashcp.kernels.tuning import TABLE, Blocks, Pass, architecture, table_dim

HEAD_DIMS = (128, 64, 96, 80, 256, 32, 16)  # by how many models have them
DTYPE = "bfloat16"
CASE_S = 25.0  # of one pass on one pack, most of it compiling
FINALISTS = 5  # take turns with the table's own, after each was timed alone
ALONE_S, TURNS_S = 0.05, 1.0
LARGEST_DIFFERENCE = 2e-2  # of two kernels in bf16
SMALL = [30, 2]


def cases(small: bool) -> list[Case]:
    """Each pass on a long document and on short ones."""
    if small:
        return [Case(f"32_{which.value}_long", 20, 120) for which in (Pass.FORWARD, Pass.BACKWARD_Q)]
    labels = [f"{head_dim}_{which.value}_{pack}" for head_dim in HEAD_DIMS for pack in PACKS for which in Pass]
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
    shipped = TABLE[arch, table_dim(head_dim), dtype.itemsize, which][list(PACKS).index(pack)]
    alone: dict[Blocks, float] = {}
    expected: tuple[Tensor, ...] = ()
    for blocks, registers in _fitting(which, arch, head_dim, shipped, turn.small):
        name = blocks.to_text()
        if time.monotonic() > until:
            break
        if name in turn.left_out:
            continue
        yield Number(name, "registers", "registers", None, float(registers), None)
        turn.begin(name)
        try:
            (one,) = work([blocks]).values()
            results = _results(one())
            expected = expected or results
            error = max(relative_error(value, other) for value, other in zip(results, expected, strict=True))
            if not error <= LARGEST_DIFFERENCE:
                raise RuntimeError(f"differs from {shipped.to_text()} by {error:.1e}: a wrong kernel is not timed")
            alone[blocks] = in_turns_ms({name: one}, turn.device, ALONE_S)[name][1]
        except Exception as failure:
            check_device(turn.device)
            yield Failure(name, reason(failure))
            continue
        yield Number(name, "alone_ms", "ms", None, alone[blocks], None)
    turn.begin("")
    best = sorted(alone, key=alone.__getitem__)[:FINALISTS]
    finalists = [blocks for blocks in dict.fromkeys([shipped, *best]) if blocks in alone]
    for name, spread in in_turns_ms(work(finalists), turn.device, TURNS_S).items():
        yield Number(name, "shipped_ms" if name == shipped.to_text() else "candidate_ms", "ms", *spread)


PART = Part("block shapes beside those of the table", 3.0, cases, measure)


def _results(found: object) -> tuple[Tensor, ...]:
    """The output, or the gradients."""
    return (found.detach(),) if isinstance(found, Tensor) else tuple(cast(tuple[Tensor, ...], found))


def _fitting(which: Pass, arch: str, head_dim: int, shipped: Blocks, small: bool) -> Iterator[tuple[Blocks, int]]:
    """The table's blocks, then candidates that spill nothing, fit the chip and use its tensor cores, as they are
    compiled, the largest first: of those most win. With the registers that they take."""
    by_size = sorted(grid(DTYPE), key=lambda blocks: -blocks.block_m * blocks.block_n)
    candidates = list(dict.fromkeys([shipped, *by_size[:: 20 if small else 1]]))
    kernels = [tuned(which, arch, head_dim, DTYPE, blocks) for blocks in candidates]
    for blocks, kernel, one in zip(candidates, kernels, compile_all(kernels, _pool()), strict=True):
        if isinstance(one, Build) and (blocks == shipped or fit(one, kernel)):
            yield blocks, one.registers


@cache
def _pool() -> ProcessPoolExecutor:
    return compilers(max(1, (os.cpu_count() or 2) - 2))
