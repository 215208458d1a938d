"""Exchanges between ranks, on every transport that is there: `flashcp bench exchange`.

Where hydra is not installed: `python -m flashcp.experiments.bench.exchange --world_size 4 --out DIR`, which starts the
ranks of one machine. Started by a launcher it is one of the ranks: `torchrun --nnodes 2 --nproc-per-node 8 ... -m
flashcp.experiments.bench.exchange --out DIR` on every machine.

Every variant is first checked against the float64 reference, values, gradients and bytes; a wrong one is not timed.
Rows, table and figure: what leaves each rank, the latency of one row, bandwidth, and how much of the exchange
attention hides at each level of overlap.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from flashcp.experiments.bench.exchange_times import ExchangeBench, measure
from flashcp.experiments.bench.harness import rows_table
from flashcp.experiments.cli.launch import BAD_INPUT, RanksFailedError, start_ranks
from flashcp.experiments.folders import check_out, leave_no_trace
from flashcp.experiments.sweep.results import Number, Row, commit, read_rows, versions_text, write_rows
from flashcp.train.ranks import exit_code, world
from flashcp.train.summary import versions

OUT = "outputs/bench/exchange"
WIRES = {"shm": "CPU shared memory", "gloo": "CPU, gloo over TCP"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, or be one of its ranks where a launcher says so. Returns 0; 2 for bad input; else 1."""
    parser = argparse.ArgumentParser(prog="bench_exchange", description=__doc__)
    parser.add_argument("--out", default=OUT, help="directory of rows and figure")
    for key in fields(ExchangeBench):
        default = getattr(ExchangeBench(), key.name)
        many = {"nargs": "*", "type": str} if isinstance(default, list) else {"type": type(default)}
        parser.add_argument(f"--{key.name}", default=default, **many)
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    bench = ExchangeBench(**options)
    if "RANK" in os.environ:
        return exit_code(lambda: be_a_rank(bench, Path(out)))
    try:
        rows, folder = bench_exchange(bench, out)
    except (ValueError, RanksFailedError) as error:
        print(f"bench_exchange: {error}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, ValueError) else 1
    print(exchange_table(rows))
    print(f"wrote {folder}", file=sys.stderr)
    return 0


def bench_exchange(bench: ExchangeBench, out: str) -> tuple[list[Row], Path]:
    """Start the ranks on this machine and wait for their rows. Returns the rows and their directory.

    Raises ValueError for bad input, RanksFailedError when a rank fails, for instance because a result is wrong.
    """
    bench.check()
    folder = Path(out)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    check_out(folder)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "ranks.log"
    arguments = ["-m", "flashcp.experiments.bench.exchange", "--out", str(folder), *options_of(bench)]
    outcome = start_ranks(arguments, bench.world_size, bench.threads, log)
    if outcome.code not in (0, BAD_INPUT):
        raise RanksFailedError(outcome.error)
    leave_no_trace([log], made)
    if outcome.code:
        raise ValueError(outcome.error)
    return read_rows(folder), folder


def options_of(bench: ExchangeBench) -> list[str]:
    words = []
    for name, value in vars(bench).items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def be_a_rank(bench: ExchangeBench, folder: Path) -> None:
    """Measure together with the other ranks; rank 0 writes rows and figure."""
    with world(bench.device, bench.timeout_s) as ranks:
        bench = replace(bench, world_size=ranks.world_size)
        bench.check()
        said = sys.stderr if ranks.rank == 0 else io.StringIO()
        numbers = list(measure(bench, ranks, partial(print, file=said, flush=True)))
        if ranks.rank == 0:
            told = versions(ranks.device)
            folder.mkdir(parents=True, exist_ok=True)
            rows = [to_row(bench.case, number, told) for number in numbers]
            write_rows(folder, rows)
            from flashcp.experiments.plots import draw_exchanges  # late: matplotlib

            draw_exchanges(rows, folder / "exchange.png")


def to_row(case: str, number: Number, told: dict[str, str]) -> Row:
    """A number with all that it must carry. told: versions of what ran it."""
    transport = number.provider.split("/")[0]
    device = f"{told['device']}, {os.cpu_count()} cores; {WIRES.get(transport, transport)}"
    return Row(case, *number[:3], None, *number[3:], device, versions_text(told), commit(), told["date"], "measured")


def exchange_table(rows: Sequence[Row]) -> str:
    """One line a transport and exchange; columns that nothing was measured for are left out."""
    return f"{rows[0].case}, of the busiest rank\n{rows_table(rows, {'transport/exchange': 'provider'}, 'exchange')}"


if __name__ == "__main__":
    sys.exit(main())
