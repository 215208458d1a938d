"""Our kernels beside every peer that is there, and the machine's own ceilings, in one run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

from flashcp.experiments.bench.attention_cases import OURS, all_cases, pack
from flashcp.experiments.bench.attention_cases import Case as AttentionCase
from flashcp.experiments.bench.attention_peers import PEERS
from flashcp.experiments.bench.attention_times import measure as measure_attention
from flashcp.experiments.bench.harness import Work, in_turns_ms
from flashcp.experiments.campaign.part import Case, Part, Turn
from flashcp.experiments.campaign.tools import NCU, case_of, under
from flashcp.experiments.sweep.results import Failure, Number

CEILINGS = "ceilings"
COPIED_BYTES = 4 << 30
PRODUCT = 8192
SHARE_S = 1.5  # of timing, for each case
SLOW, OF_SLOW = "flex", "_flex"
"""FlexAttention is compiled anew for every case, some 20 s each way: in a few cases of its own, beside ours alone."""
BUILT = tuple(f"{name}_32x32" for name in ("one_16k", "pile", "one_4k"))
FIRST = ("one_16k", "pile", "16x8k", "wlb_llm", "one_4k", "one_32k", "rank_of_8_per_document", "redpajama")
"""What the published numbers are about; the other cases follow, and grouped heads after both."""


def cases(small: bool) -> list[Case]:
    """The ceilings, the cases of `attention_cases` by value, and one call under ncu."""
    found = _attention_cases(small)
    plain, grouped = ([Case(label, 6, 120) for label in found if found[label].grouped == of] for of in (False, True))
    built = [Case(f"{label}{OF_SLOW}", 45, 150) for label in (found if small else BUILT)]
    return [Case(CEILINGS, 5, 60), *plain, *built, *grouped, case_of(NCU)]


def measure(label: str, turn: Turn) -> Iterator[Number | Failure]:
    """See `attention_times.measure`."""
    if label == CEILINGS:
        yield from ceilings(turn.device, turn.small)
    elif label == NCU:
        yield from under(NCU, turn)
    else:
        name = label.removesuffix(OF_SLOW)
        others = {SLOW} if name == label else PEERS.keys() - {SLOW, OURS}
        case, share_s = _attention_cases(turn.small)[name], 0.1 if turn.small else SHARE_S
        yield from measure_attention(case, turn.device, turn.left_out | others, turn.begin, share_s)


PART = Part("attention beside its peers, useful TFLOP/s", 4.0, cases, measure)


def ceilings(device: torch.device, small: bool) -> Iterator[Number]:
    """What a copy moves, bytes read and written, and what a bf16 product of random matrices reaches."""
    size, length = (256, 1 << 20) if small else (PRODUCT, COPIED_BYTES // 2)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    source = torch.randn(length, device=device).half()
    target = torch.empty_like(source)
    work: dict[str, Work] = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
    times = in_turns_ms(work, device, 1.0)
    amounts = {"copy": 2 * source.nbytes / 1e6, "matmul": 2 * size**3 / 1e9}
    rates = {"copy": ("copy_gbps", "GB/s"), "matmul": ("matmul_tflops", "TFLOP/s")}
    for name, spread in times.items():
        yield Number(name, f"{name}_ms", "ms", *spread)
        low, middle, high = (amounts[name] / ms for ms in reversed(spread))
        yield Number(name, *rates[name], low, middle, high)


@cache
def _attention_cases(small: bool) -> dict[str, AttentionCase]:
    if small:
        tiny = pack("tiny", (60, 1, 300, 129, 20), (4, 2), 16)
        return {tiny.label: tiny}
    found = {case.label: case for case in all_cases()}

    def value(case: AttentionCase) -> tuple[bool, int]:
        return case.grouped, FIRST.index(case.name) if case.name in FIRST else len(FIRST)

    return {case.label: case for case in sorted(found.values(), key=value)}
