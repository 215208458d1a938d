"""Attention of one device beside every peer that is installed: `flashcp bench attention`.

For each case every provider is first checked against float64, then all that are right are timed in turns, the L2 cache
flushed before each measurement. What fails is a row with its reason, and costs no other provider its own. Rows and
figures go to `experiments/results/<device>/attention/`. A case that would not fit in the time is left out and said.
Where hydra is not installed: `python -m flashcp.experiments.campaign attention`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from flashcp.experiments.bench.attention_cases import OURS, Case, Tensors, cases_by_value, exact_share, make_tensors
from flashcp.experiments.bench.attention_peers import PEERS, Forward
from flashcp.experiments.bench.harness import Spread, Work, in_turns_ms, relative_error
from flashcp.experiments.campaign import part
from flashcp.experiments.campaign.watch import run_part
from flashcp.experiments.folders import check_out
from flashcp.experiments.sweep.results import Failure, Number, Row, check_device, reason
from flashcp.kernels.schedule import Schedule
from flashcp.kernels.tiles import OWN, key_tiles, query_tiles
from flashcp.kernels.tuning import Blocks, Pass, architecture, choose
from flashcp.limits import Limit
from flashcp.sharding.documents import expand_ranges
from flashcp.simulator.cost import BACKWARD_FLOPS, FORWARD_FLOPS

LARGEST_ERROR = 1e-2  # bf16 against float64
CEILINGS = "ceilings"
COPIED_BYTES = 4 << 30
PRODUCT = 8192
SHARE_S = 1.5  # of timing, for each case
SLOW, OF_SLOW = "flex", "_flex"
"""FlexAttention is compiled anew for every case, some 20 s each way: in a few cases of its own, beside ours alone."""
BUILT = tuple(f"{name}_32x32" for name in ("one_16k", "pile", "one_4k"))


@dataclass
class AttentionBench:
    """minutes: cases that begin later than this are left out. cases: only those whose name holds this text."""

    minutes: Annotated[float, Limit(lambda value: 0 < value < float("inf"), "a number > 0")] = 8.0
    cases: str = ""


def bench_attention(bench: AttentionBench, out: str) -> tuple[list[Row], Path]:
    """The part `attention` of the campaign, and figures of it.

    out: directory; auto: experiments/results/<device>/attention of this checkout. Returns the rows and that directory.
    Raises ValueError, before anything is written, where there is no GPU or no such case.
    """
    if not torch.cuda.is_available():
        raise ValueError("attention is measured on a GPU, and torch sees none here")
    labels = [case.label for case in cases(False)]
    if not any(bench.cases in label for label in labels):
        raise ValueError(f"cases={bench.cases!r}: expected a part of one of {', '.join(labels)}")
    device = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()).strip("_")
    results = Path(__file__).resolve().parents[1] / "results"
    folder = results / device / "attention" if out == "auto" else Path(out)
    check_out(folder)
    rows = run_part(part.PARTS["attention"], folder, 60 * bench.minutes, cases=bench.cases).rows
    from flashcp.experiments.plots import draw_rates  # late: the campaign's machines may have no matplotlib

    draw_rates(rows, folder)
    return rows, folder


def attention_table(rows: Sequence[Row]) -> str:
    """One line a case: TFLOP/s forward / backward of each provider, - where it has none; of other cases every rate."""
    cells = {(row.case, row.provider, row.metric): row.median for row in rows}
    keys = ("forward_tflops", "backward_tflops")
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        shown = []
        for peer in PEERS:
            rates = [cells.get((case, peer, key)) for key in keys]
            if rates[0] is not None:
                shown.append(f"{peer} {'/'.join('-' if rate is None else f'{rate:.0f}' for rate in rates)}")
        if not shown:
            others = [row for row in rows if row.case == case and row.unit.endswith("/s")]
            shown = [f"{row.provider} {row.median:.0f} {row.unit}" for row in others]
        error = cells.get((case, OURS, "relative_error"))
        told = "" if error is None else f"error {error:.1e}"
        lines.append(f"{case:<42} {told:<13}  {'  '.join(shown)}".rstrip())
    return "\n".join(lines)


# --- a part of the campaign: every case, and the machine's own ceilings, in one run


def cases(small: bool) -> list[part.Case]:
    """The ceilings, the cases of `attention_cases` by value, and one call under ncu."""
    found = cases_by_value(small)
    plain, grouped = (
        [part.Case(label, 6, 120) for label in found if found[label].grouped == of] for of in (False, True)
    )
    built = [part.Case(f"{label}{OF_SLOW}", 45, 150) for label in (found if small else BUILT)]
    return [part.Case(CEILINGS, 5, 60), *plain, *built, *grouped, part.case_of(part.NCU)]


def measure(label: str, turn: part.Turn) -> Iterator[Number | Failure]:
    """See `measure_case`."""
    if label == CEILINGS:
        yield from ceilings(turn.device, turn.small)
    elif label == part.NCU:
        yield from part.under(part.NCU, turn)
    else:
        name = label.removesuffix(OF_SLOW)
        others = {SLOW} if name == label else PEERS.keys() - {SLOW, OURS}
        case, share_s = cases_by_value(turn.small)[name], 0.1 if turn.small else SHARE_S
        yield from measure_case(case, turn.device, turn.left_out | others, turn.begin, share_s)


PART = part.Part("attention beside its peers, useful TFLOP/s", 4.0, cases, measure)


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


# --- one case: every provider is checked, then all that are right are timed in turns


def measure_case(
    case: Case,
    device: torch.device,
    left_out: Collection[str] = (),
    begin: Callable[[str], None] = lambda provider: None,
    share_s: float = 4.0,
) -> Iterator[Number | Failure]:
    """Check, then time every provider of a case; one that has no backward, forward only.

    left_out: names of providers. begin: is told whose turn it is. share_s: seconds of timing. Raises RuntimeError
    where the device takes no more work: what comes next needs another process.
    """
    x = make_tensors(case, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    wanted = exact_share(case, x, case.kv_heads - 1)
    work: dict[str, Work] = {}
    for name, make in PEERS.items():
        if name in left_out:
            continue
        begin(name)
        told = ""
        try:
            forward = make(case, x)
            if forward is None:
                continue
            out = forward()
            error = checked(case, {"out": out.detach()}, wanted)
            yield Number(name, "relative_error", "1", None, error, None)
            work[f"{name}/forward"] = forward
            if not out.requires_grad:
                continue
            told = "backward: "
            backward = partial(torch.autograd.grad, out, x.leaves, x.grad, retain_graph=True)
            error = checked(case, dict(zip(("q", "k", "v", "received"), backward(), strict=False)), wanted)
            yield Number(name, "backward_relative_error", "1", None, error, None)
            work[f"{name}/backward"] = backward
        except Exception as failure:
            check_device(device)
            yield Failure(name, f"{told}{reason(failure)}")
    mine: Forward | None = work.get(f"{OURS}/forward")  # type: ignore[assignment]
    if mine and f"{OURS}/backward" in work:
        begin(OURS)
        yield from _of_ours(case, x, mine, device)
    if mine:
        work[f"{OURS}/forward_no_grad"] = torch.no_grad()(mine)
    begin("")
    yield from _timed(case, work, device, share_s)


def checked(case: Case, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest relative error of an output, or of its gradients, for the last KV head and its query heads.

    Raises RuntimeError for one that is too large: a wrong kernel is not timed.
    """
    group = case.query_heads // case.kv_heads
    shares = {name: value[:, -group:] if name in ("out", "q") else value[..., -1, :] for name, value in found.items()}
    error = max(relative_error(share, wanted[name]) for name, share in shares.items())
    if not error <= LARGEST_ERROR:
        raise RuntimeError(f"relative error {error:.2e}: a wrong kernel is not timed")
    return error


def _of_ours(case: Case, x: Tensors, forward: Forward, device: torch.device) -> Iterator[Number | Failure]:
    """What is told of our kernels alone: memory beyond the results, and useful shares of the blocks they compute."""
    try:
        if device.type == "cuda":
            yield Number(OURS, "extra_memory_share", "of q", None, extra_memory(x, forward), None)
        for kernel in Pass:
            blocks = choose(kernel, architecture(device), case.head_dim, x.q.dtype, case.schedule)
            share = useful_share(case.schedule, case.rows, kernel, blocks)
            yield Number(OURS, f"{kernel.value}_useful_share", "of computed pairs", None, share, None)
    except Exception as failure:
        check_device(device)
        yield Failure(OURS, reason(failure))


def useful_share(schedule: Schedule, rows: int, which: Pass, blocks: Blocks) -> float:
    """Causal pairs over the pairs in all blocks that the kernel of a pass computes: counted, not timed."""
    of_keys = which is Pass.BACKWARD_KV
    tile_rows, step = blocks.tile_rows(which), blocks.block_m if of_keys else blocks.block_n
    tiles = (key_tiles if of_keys else query_tiles)(schedule, rows, tile_rows)
    row, tile_stop, first, last = tiles.table[:, 1:].T
    tile = np.repeat(np.arange(len(row)), last - first)
    place, start, stop = tiles.ranges[expand_ranges(first, last - first), :3].T
    own = place == OWN  # read up to the tile's end, or from its first row on
    start = np.where(own & of_keys, row[tile], start)
    stop = np.where(own & (not of_keys), tile_stop[tile], stop)
    return schedule.pairs / int((-(-(stop - start) // step)).sum() * step * tile_rows)


def _timed(case: Case, work: dict[str, Work], device: torch.device, share_s: float) -> Iterator[Number | Failure]:
    """Times in turns; who fails at it is left out, and the others take their turns again."""
    running = [""]

    def told(label: str, function: Work) -> Work:
        def run() -> object:
            running[0] = label
            return function()

        return run

    times: dict[str, Spread] = {}
    while work and not times:
        try:
            times = in_turns_ms({label: told(label, function) for label, function in work.items()}, device, share_s)
        except Exception as failure:
            check_device(device)
            name = running[0].split("/")[0]
            yield Failure(name, f"timing {running[0]}: {reason(failure)}")
            work = {label: function for label, function in work.items() if label.split("/")[0] != name}
    for label, spread in times.items():
        name, which = label.split("/")
        flops = case.forward_flops * (BACKWARD_FLOPS / FORWARD_FLOPS if which == "backward" else 1.0)
        yield Number(name, f"{which}_ms", "ms", *spread)
        low, middle, high = (flops / ms / 1e9 for ms in reversed(spread))
        yield Number(name, f"{which}_tflops", "TFLOP/s", low, middle, high)


def extra_memory(x: Tensors, forward: Forward) -> float:
    """Peak bytes of forward and backward beyond inputs, output, log-sum-exp and gradients, over q's bytes.

    Gradients of received rows are fp32 and counted as what they are.
    """
    torch.autograd.grad(forward(), x.leaves, x.grad)  # tables and kernels are there from now on
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(forward(), x.leaves, x.grad)
    peak = torch.cuda.max_memory_allocated() - before
    lse = 4 * x.q.shape[0] * x.q.shape[1]
    gradients = x.q.nbytes + x.k.nbytes + x.v.nbytes + x.received.nbytes * (4 // x.received.element_size() + 1)
    return max(0, peak - x.q.nbytes - lse - gradients) / x.q.nbytes
