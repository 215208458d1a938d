"""What overlap hides on one GPU, between ranks that are streams of one process.

`python -m flashcp.experiments.bench.virtual`. The first rank attends and the others only send, for they would compute
on GPUs of their own. Rows leave at a rate at which the first rank's take about as long as its tiles of local rows: with
all of it hidden a forward pass takes max(compute, transfer). Needs no hydra. On a CPU: to try it, not to measure it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import flashcp
from flashcp.comm.exchanges.exchange import Layout
from flashcp.experiments.bench.virtual_ranks import VirtualRanks
from flashcp.experiments.sweep.results import Number, to_row, write_rows
from flashcp.kernels.interface import KV
from flashcp.kernels.selection import select_attention
from flashcp.sharding.plan import ShardingPlan

__all__ = ["main"]

ROUNDS = 10
ATTENDING = 0


@torch.no_grad()  # regions go back at the end of a call, not of a backward pass that never comes
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write rows. Returns 0."""
    parser = argparse.ArgumentParser(prog="bench_virtual", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/virtual"))
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = flashcp.plan([options.tokens], options.ranks, "per_document")
    q, k, v = (_shares(plan, options.heads, options.head_dim, device) for _ in range(3))
    scale = options.head_dim**-0.5

    layout = Layout("exact", plan, ATTENDING)
    local_ms = _median_ms(lambda: _local_tiles(layout, q, k, v, scale), device)
    # On a GPU the delays of all who send share one way to the host, so the rows of all of them count.
    rows_bytes = int(plan.route("exact").sent_rows.sum()) * 2 * k[0][0].nbytes
    throttle_gbps = rows_bytes / (local_ms * 1e6)

    def measured(ranks: VirtualRanks) -> float:
        return _median_ms(lambda: ranks.forward(plan, q, k, v, scale, [ATTENDING]), device)

    free = VirtualRanks(options.ranks, device, overlap="none")
    times = {"local_tiles_ms": local_ms, "compute_ms": measured(free)}
    (expected,) = free.forward(plan, q, k, v, scale, [ATTENDING])
    for overlap in ("none", "staged", "fused"):
        ranks = VirtualRanks(options.ranks, device, overlap=overlap, throttle_gbps=throttle_gbps)
        (out,) = ranks.forward(plan, q, k, v, scale, [ATTENDING])
        torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
        times[f"{overlap}_ms"] = measured(ranks)
    times["transfer_ms"] = max(0.0, times["none_ms"] - times["compute_ms"])  # `none` waits first and computes then
    bound = max(times["compute_ms"], times["transfer_ms"])
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    versions = f"flashcp {flashcp.__version__}, torch {torch.__version__}"
    case = f"{options.ranks}_ranks_{options.tokens}_{options.heads}x{options.head_dim}"
    numbers = [*((metric, "ms", value) for metric, value in times.items())]
    numbers += [(f"{level}_over_bound", "1", times[f"{level}_ms"] / bound) for level in ("none", "staged", "fused")]
    found = [Number("flashcp", metric, unit, None, value, None) for metric, unit, value in numbers]
    rows = [to_row(case, number, name, of_versions=versions) for number in found]
    options.out.mkdir(parents=True, exist_ok=True)
    write_rows(options.out, rows)
    print("\n".join(f"{metric:<20} {value:9.3f} {unit}" for metric, unit, value in numbers))
    return 0


def _shares(plan: ShardingPlan, heads: int, head_dim: int, device: torch.device) -> list[Tensor]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [torch.randn(int(rows), heads, head_dim, device=device, dtype=dtype) for rows in plan.tokens]


def _local_tiles(layout: Layout, q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], scale: float) -> None:
    """What the rank can compute before rows arrive."""
    queries, keys, values = q[ATTENDING], k[ATTENDING], v[ATTENDING]
    kernel = select_attention("auto", queries.device)
    kernel.attend(queries, KV(keys, values), KV(keys[:0], values[:0]), layout.local_schedule, scale)


def _median_ms(work: Callable[[], object], device: torch.device) -> float:
    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    once()
    return statistics.median(once() for _ in range(ROUNDS))


if __name__ == "__main__":
    sys.exit(main())
