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

import torch
from torch import Tensor

from flashcp.experiments.attention_cases import Case, Tensors, exact_share, make_tensors, useful_share
from flashcp.experiments.attention_peers import OURS, PEERS, Forward
from flashcp.experiments.folders import check_out
from flashcp.experiments.numbers import Failure, Number, check_device, reason
from flashcp.experiments.rows import Row
from flashcp.experiments.timing import Spread, Work, in_turns_ms
from flashcp.kernels.tuning import Pass, architecture, choose

__all__ = ["AttentionBench", "attention_table", "bench_attention", "checked_output", "measure", "reason"]

LARGEST_ERROR = 1e-2  # bf16 against float64
BACKWARD_FLOPS = 2.5
SHARE_S = 4.0  # seconds for the measurements of one case


@dataclass
class AttentionBench:
    """minutes: cases that begin later than this are left out. cases: only those whose name holds this text."""

    minutes: float = 8.0
    cases: str = ""


def bench_attention(bench: AttentionBench, out: str) -> tuple[list[Row], Path]:
    """The part `attention` of the campaign, and figures of it.

    out: directory; empty: `results_folder`. Returns the rows and that directory. Raises ValueError, before anything
    is written, where there is no GPU, and for settings that leave nothing to measure.
    """
    from flashcp.experiments.campaign import attention
    from flashcp.experiments.campaign.watch import run_part

    if not 0 < bench.minutes < float("inf"):
        raise ValueError(f"minutes={bench.minutes}: expected a number > 0")
    if not torch.cuda.is_available():
        raise ValueError("attention is measured on a GPU, and torch sees none here")
    labels = [case.label for case in attention.cases(small=False)]
    if not any(bench.cases in label for label in labels):
        raise ValueError(f"cases={bench.cases!r}: expected a part of one of {', '.join(labels)}")
    folder = Path(out) if out else results_folder(torch.cuda.get_device_name())
    check_out(folder)
    rows = run_part(attention.__name__, folder, 60 * bench.minutes, cases=bench.cases).rows
    draw(folder, rows)
    return rows, folder


def measure(
    case: Case,
    device: torch.device,
    left_out: Collection[str] = (),
    begin: Callable[[str], None] = lambda provider: None,
    share_s: float = SHARE_S,
) -> Iterator[Number | Failure]:
    """Check, then time every provider of a case; one that has no backward, forward only.

    left_out: names of providers. begin: is told whose turn it is. share_s: seconds of timing. Raises RuntimeError
    where the device takes no more work: what comes next needs another process.
    """
    x = make_tensors(case, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    wanted = exact_share(case, x, case.kv_heads - 1)
    work: dict[str, Work] = {}
    forwards: dict[str, Forward] = {}
    for name, make in PEERS.items():
        if name in left_out:
            continue
        begin(name)
        try:
            forward = make(case, x)
            if forward is not None:
                out = forward()
                yield Number(name, "relative_error", "1", None, checked(case, {"out": out.detach()}, wanted), None)
                work[f"{name}/forward"] = forwards[name] = forward
        except Exception as failure:
            check_device(device)
            yield Failure(name, reason(failure))
            continue
        if forward is None or not out.requires_grad:
            continue
        backward = partial(torch.autograd.grad, out, x.leaves, x.grad, retain_graph=True)
        try:
            error = checked(case, _named(backward()), wanted)
        except Exception as failure:
            check_device(device)
            yield Failure(name, f"backward: {reason(failure)}")
            continue
        yield Number(name, "backward_relative_error", "1", None, error, None)
        work[f"{name}/backward"] = backward
    if f"{OURS}/backward" in work:
        begin(OURS)
        yield from _of_ours(case, x, forwards[OURS], device)
    if OURS in forwards:
        work[f"{OURS}/forward_no_grad"] = torch.no_grad()(forwards[OURS])
    begin("")
    yield from _timed(case, work, device, share_s)


def checked(case: Case, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest relative error of an output, or of its gradients, for the last KV head and its query heads.

    Raises RuntimeError for one that is too large: a wrong kernel is not timed.
    """
    head, group = case.kv_heads - 1, case.query_heads // case.kv_heads
    shares = {
        "out": lambda value: value[:, head * group :],
        "q": lambda value: value[:, head * group :],
        "k": lambda value: value[:, head],
        "v": lambda value: value[:, head],
        "received": lambda value: value[:, :, head],
    }
    error = max(relative(shares[name](value), wanted[name]) for name, value in found.items())
    if not error <= LARGEST_ERROR:
        raise RuntimeError(f"relative error {error:.2e}: a wrong kernel is not timed")
    return error


def _named(gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    """Gradients of a case's leaves by name."""
    return dict(zip(("q", "k", "v", "received"), gradients, strict=False))


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
        flops = case.forward_flops * (BACKWARD_FLOPS if which == "backward" else 1.0)
        yield Number(name, f"{which}_ms", "ms", *spread)
        low, middle, high = (flops / ms / 1e9 for ms in reversed(spread))
        yield Number(name, f"{which}_tflops", "TFLOP/s", low, middle, high)


def checked_output(forward: Forward, x: Tensors, expected: Tensor) -> Tensor:
    """The output of a peer, its backward run where it has one. Raises RuntimeError where it differs from `expected`."""
    out = forward()
    if out.requires_grad:
        torch.autograd.grad(out, x.leaves, x.grad, retain_graph=True)
    difference = relative(out.detach(), expected)
    if not difference <= 2 * LARGEST_ERROR:
        raise RuntimeError(f"differs by {difference:.1e}")
    return out


def relative(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference||; inf for anything that is not finite."""
    error = ((value.double() - reference.double()).norm() / reference.double().norm()).item()
    return error if error == error else float("inf")


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


def attention_table(rows: Sequence[Row]) -> str:
    """One line a case: TFLOP/s forward / backward of each provider, - where it has none; of other cases every rate."""
    cells = {(row.case, row.provider, row.metric): row.median for row in rows}
    keys = ("forward_tflops", "backward_tflops")
    lines = []
    for case in dict.fromkeys(row.case for row in rows):
        shown = [
            f"{peer} "
            + "/".join(f"{cells[case, peer, key]:.0f}" if (case, peer, key) in cells else "-" for key in keys)
            for peer in PEERS
            if (case, peer, keys[0]) in cells
        ]
        if not shown:
            rates = [row for row in rows if row.case == case and row.unit.endswith("/s")]
            shown = [f"{row.provider} {row.median:.0f} {row.unit}" for row in rates]
        error = cells.get((case, OURS, "relative_error"))
        told = "" if error is None else f"error {error:.1e}"
        lines.append(f"{case:<42} {told:<13}  {'  '.join(shown)}".rstrip())
    return "\n".join(lines)


def draw(folder: Path, rows: Sequence[Row]) -> None:
    """A figure per pass: TFLOP/s of every provider on every case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for which in ("forward", "backward"):
        kept = [row for row in rows if row.metric == f"{which}_tflops"]
        cases, peers = list(dict.fromkeys(row.case for row in kept)), list(dict.fromkeys(row.provider for row in kept))
        figure, axes = pyplot.subplots(figsize=(10, 1 + 0.45 * len(cases)), layout="constrained")
        for i, peer in enumerate(peers):
            mine = {row.case: row for row in kept if row.provider == peer}
            at = [cases.index(case) + 0.8 * (i / len(peers) - 0.5) for case in mine]
            axes.barh(at, [row.median for row in mine.values()], 0.8 / len(peers), label=peer)
        axes.set_yticks(range(len(cases)), cases)
        axes.invert_yaxis()
        axes.set_xlabel(f"{which}, useful TFLOP/s (bf16, head_dim 128; higher is better)")
        if peers:
            axes.legend()
        figure.savefig(folder / f"{which}.png", dpi=150)
        pyplot.close(figure)


def results_folder(device_name: str) -> Path:
    """experiments/results/<device>/attention of this checkout."""
    device = re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")
    return Path(__file__).resolve().parent / "results" / device / "attention"
