"""Attention of one device beside every peer that is installed: `flashcp bench attention`.

Where hydra is not installed: `python -m flashcp.experiments.bench_attention --minutes 8 --cases pile --out DIR`.

One unattended run of under eight minutes on an H200: for each case every provider is first checked (ours against
float64, the peers against ours), then all are timed in turns, the L2 cache flushed before each measurement. Rows and
figures go to `experiments/results/<device>/attention/`. A case that would not fit in the time is left out and said.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from flashcp import __version__
from flashcp.experiments.attention_cases import Case, Tensors, all_cases, exact_share, make_tensors, useful_share
from flashcp.experiments.attention_peers import OURS, PEERS, Forward
from flashcp.experiments.folders import check_out
from flashcp.experiments.provenance import commit
from flashcp.experiments.rows import Row, write_rows
from flashcp.kernels.tuning import Pass, architecture, choose

__all__ = ["AttentionBench", "attention_table", "bench_attention", "main"]

LARGEST_ERROR = 1e-2  # bf16 against float64; peers may differ from ours by twice that
BACKWARD_FLOPS = 2.5
SHARE_S = 4.0  # seconds for the measurements of one case
FLUSH_BYTES = 256 << 20
Work = Callable[[], object]


class Number(NamedTuple):
    """One measured number of a case."""

    provider: str
    metric: str
    unit: str
    p20: float | None
    median: float
    p80: float | None


@dataclass
class AttentionBench:
    """minutes: cases that begin later than this are left out. cases: only those whose name holds this text."""

    minutes: float = 8.0
    cases: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign. Returns 0, or 2 with one line on standard error, for instance where there is no GPU."""
    parser = argparse.ArgumentParser(prog="bench_attention", description=__doc__)
    parser.add_argument("--out", default="", help="directory of the rows and figures")
    for key in fields(AttentionBench):
        parser.add_argument(f"--{key.name}", type=type(key.default), default=key.default)
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    try:
        rows, folder = bench_attention(AttentionBench(**options), out)
    except ValueError as error:
        print(f"bench_attention: {error}", file=sys.stderr)
        return 2
    print(attention_table(rows))
    print(f"wrote {folder}", file=sys.stderr)
    return 0


def bench_attention(bench: AttentionBench, out: str) -> tuple[list[Row], Path]:
    """Measure every case; its rows are written, and a line of progress said, as soon as they are there.

    out: directory; empty: `results_folder`. Returns the rows and that directory. Raises ValueError, before anything
    is written, where there is no GPU, and for settings that leave nothing to measure.
    """
    if not bench.minutes > 0:
        raise ValueError(f"minutes={bench.minutes}: expected a number > 0")
    if not torch.cuda.is_available():
        raise ValueError("attention is measured on a GPU, and torch sees none here")
    cases = list(all_cases())
    chosen = [case for case in cases if bench.cases in case.label]
    if not chosen:
        raise ValueError(f"cases={bench.cases!r}: expected a part of one of {', '.join(case.label for case in cases)}")
    device = torch.device("cuda")
    device_name = torch.cuda.get_device_name(device)
    folder = Path(out) if out else results_folder(device_name)
    check_out(folder)
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * bench.minutes - 2 * SHARE_S
    rows: list[Row] = []
    for case in chosen:
        if time.monotonic() > deadline:
            print(f"{case.label}: left out, the time is over", file=sys.stderr)
            continue
        new = [to_row(case.label, number, device_name) for number in measure(case, device)]
        rows += new
        write_rows(folder, rows)
        print(attention_table(new), file=sys.stderr, flush=True)
    draw(folder, rows)
    return rows, folder


def measure(case: Case, device: torch.device) -> Iterator[Number]:
    """Check, then time every provider of a case; one whose output asks for no gradient, forward only."""
    x = make_tensors(case, torch.bfloat16, device)
    providers = make_providers(case, x)
    error = own_error(case, x, providers[OURS])
    yield Number(OURS, "relative_error", "1", None, error, None)
    if error > LARGEST_ERROR:
        raise RuntimeError(f"{case.name}: relative error {error:.2e}: a wrong kernel is not timed")
    yield Number(OURS, "extra_memory_share", "of q", None, extra_memory(x, providers[OURS]), None)
    for kernel in Pass:
        blocks = choose(kernel, architecture(device), case.head_dim, x.q.dtype, case.schedule)
        share = useful_share(case.schedule, case.rows, kernel, blocks)
        yield Number(OURS, f"{kernel.value}_useful_share", "of computed pairs", None, share, None)
    expected = providers[OURS]().detach()
    outputs: dict[str, Tensor] = {}
    for name, forward in list(providers.items()):
        try:
            outputs[name] = checked_output(forward, x, expected)
        except Exception as failure:
            print(f"{case.label}: {name} left out: {reason(failure)}", file=sys.stderr)
            del providers[name]
    del expected
    work: dict[str, Work] = {f"{name}/forward": forward for name, forward in providers.items()}
    for name, out in outputs.items():
        if out.requires_grad:
            work[f"{name}/backward"] = partial(torch.autograd.grad, out, x.leaves, x.grad, retain_graph=True)
    work[f"{OURS}/forward_no_grad"] = torch.no_grad()(providers[OURS])
    for label, times in in_turns(work, device).items():
        name, which = label.split("/")
        flops = case.forward_flops * (BACKWARD_FLOPS if which == "backward" else 1.0)
        yield Number(name, f"{which}_ms", "ms", *times)
        yield Number(name, f"{which}_tflops", "TFLOP/s", *(flops / ms / 1e9 for ms in reversed(times)))


def make_providers(case: Case, x: Tensors) -> dict[str, Forward]:
    """Ours and every peer that does the case; a peer that fails at it is left out with a line."""
    providers: dict[str, Forward] = {}
    for name, make in PEERS.items():
        try:
            made = make(case, x)
        except Exception as failure:
            if name == OURS:
                raise
            print(f"{case.label}: {name} left out: {reason(failure)}", file=sys.stderr)
            continue
        if made is not None:
            providers[name] = made
    return providers


def checked_output(forward: Forward, x: Tensors, expected: Tensor) -> Tensor:
    """The output of a peer that also comes through its backward. Raises RuntimeError where it differs from ours."""
    out = forward()
    if out.requires_grad:
        torch.autograd.grad(out, x.leaves, x.grad, retain_graph=True)
    difference = relative(out.detach(), expected)
    if difference > 2 * LARGEST_ERROR:
        raise RuntimeError(f"differs by {difference:.1e}")
    return out


def reason(failure: Exception) -> str:
    """The first line of what an exception says, or its name."""
    return (str(failure).splitlines() or [type(failure).__name__])[0]


def own_error(case: Case, x: Tensors, forward: Forward) -> float:
    """The largest relative error of the output and of each gradient, for the last KV head and its query heads."""
    head, group = case.kv_heads - 1, case.query_heads // case.kv_heads
    out = forward()
    grads = torch.autograd.grad(out, x.leaves, x.grad)
    wanted = exact_share(case, x, head)
    found = {
        "out": out[:, head * group :],
        "q": grads[0][:, head * group :],
        "k": grads[1][:, head],
        "v": grads[2][:, head],
    }
    if len(x.received):
        found["received"] = grads[3][:, :, head]
    return max(relative(value.detach(), wanted[name]) for name, value in found.items())


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


def in_turns(work: dict[str, Work], device: torch.device) -> dict[str, tuple[float, float, float]]:
    """Milliseconds (p20, median, p80) of each function, measured in turns, the L2 cache flushed before each."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def once(function: Work) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        function()
        stop.record()
        return start, stop

    began = time.monotonic()
    for function in work.values():
        once(function)
    torch.cuda.synchronize()
    rounds = int(min(50, max(3, SHARE_S / (time.monotonic() - began))))
    events = [(label, once(function)) for _ in range(rounds) for label, function in work.items()]
    torch.cuda.synchronize()
    times = {label: torch.tensor([a.elapsed_time(b) for name, (a, b) in events if name == label]) for label in work}
    spread = torch.tensor([0.2, 0.5, 0.8])
    return {label: tuple(torch.quantile(t, spread).tolist()) for label, t in times.items()}


def to_row(case: str, number: Number, device: str) -> Row:
    """A number with all that it must carry. device: its name."""
    versions = f"flashcp {__version__}, torch {torch.__version__}, triton {triton.__version__}"
    return Row(case, number.provider, number.metric, number.unit, None, number.p20, number.median, number.p80,
               device, versions, commit(), datetime.now(UTC).date().isoformat(), "measured",
               "", "")  # fmt: skip


def attention_table(rows: Sequence[Row]) -> str:
    """One line a case: TFLOP/s forward / backward of each provider, - where it has none."""
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
        lines.append(f"{case:<42} error {cells[case, OURS, 'relative_error']:.1e}  {'  '.join(shown)}")
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


if __name__ == "__main__":
    sys.exit(main())
