"""One case of the attention benchmark: every provider is checked, then all that are right are timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from flashcp.experiments.bench.attention_cases import OURS, Case, Tensors, exact_share, make_tensors
from flashcp.experiments.bench.attention_peers import PEERS, Forward
from flashcp.experiments.bench.harness import Spread, Work, in_turns_ms, relative_error
from flashcp.experiments.sweep.results import Failure, Number, check_device, reason
from flashcp.kernels.schedule import Schedule
from flashcp.kernels.tiles import OWN, key_tiles, query_tiles
from flashcp.kernels.tuning import Blocks, Pass, architecture, choose
from flashcp.sharding.documents import expand_ranges
from flashcp.simulator.cost import BACKWARD_FLOPS, FORWARD_FLOPS

LARGEST_ERROR = 1e-2  # bf16 against float64


def measure(
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
