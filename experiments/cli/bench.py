"""`flashcp bench NAME`: benchmarks, one module each, their rows in one CSV each."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from flashcp.experiments.cli import show
from flashcp.experiments.cli.compose import Job, run
from flashcp.experiments.cli.launch import RanksFailedError
from flashcp.experiments.folders import check_file
from flashcp.schema import read_dataclass

WORDS = "NAME [KEY=VALUE ...]"
Run = Callable[[Any, str], tuple[list[Any], Path]]


class Bench(NamedTuple):
    """A dataclass of what to measure, the keys of conf/bench/NAME.yaml but for `out`; from it and `out` rows (named
    tuples or dataclasses) and the place they were written to; from rows a table. beside: suffixes of files that are
    written beside it.
    """

    settings: type[Any]
    run: Run
    table: Callable[[list[Any]], str]
    beside: tuple[str, ...]


def _bench(module: str, settings: str, measure: str, table: str, write: str = "", suffix: str = ".csv") -> Bench:
    """A benchmark by the names of its parts, imported when it is asked for.

    measure: makes the rows and writes them, or makes rows that `write`, named with its module, puts in one file.
    """
    found = import_module(f"flashcp.experiments.{module}")
    run, beside = getattr(found, measure), getattr(found, "BESIDE", ())
    if write:
        place, _, name = write.rpartition(".")
        run = partial(_into_file, run, getattr(import_module(f"flashcp.experiments.{place}"), name), suffix, beside)
    return Bench(getattr(found, settings), run, getattr(found, table), beside)


PLANNER_ROWS = "bench.planner.write_planner_rows"
WHERE = {
    "planner": ("bench.planner", "PlannerBench", "bench_planner", "planner_table", PLANNER_ROWS),
    "awkward": ("bench.planner", "AwkwardBench", "bench_awkward", "awkward_table", PLANNER_ROWS),
    "attention": ("bench.attention", "AttentionBench", "bench_attention", "attention_table"),
    "exchange": ("bench.exchange", "ExchangeBench", "bench_exchange", "exchange_table"),
    "lab": ("lab.lab", "LabBench", "bench_lab", "lab_table"),
    "paper_fit": ("paper.fit", "PaperFit", "fit_rows", "fit_table", "paper.fit.write_fit", ".yaml"),
    "calibrate": (
        *("bench.calibrate", "CalibrateBench", "bench_calibrate", "calibration_table"),
        *("bench.calibrate.write_calibration", ".yaml"),
    ),
    "mixes": ("bench.planner", "MixesBench", "bench_mixes", "mixes_table", PLANNER_ROWS),
}
"""The arguments of `_bench`, by the benchmark's name."""
BENCHES: dict[str, Callable[[], Bench]] = {name: partial(_bench, *names) for name, names in WHERE.items()}


def main(arguments: Sequence[str]) -> int:
    """Measure, write to out= (by default below outputs/), print the table or one JSON document."""
    name = arguments[0] if arguments else ""
    if name not in BENCHES:
        raise ValueError(f"bench {name!r}: expected one of {', '.join(BENCHES)}")
    return run(partial(measure, name), f"bench/{name}", arguments[1:])


def measure(name: str, job: Job) -> None:
    bench, settings = BENCHES[name](), dict(job.settings)
    out = settings.pop("out")
    if isinstance(out, bool | list | dict) or out in (None, ""):
        raise ValueError(f"out={out!r}: expected a path")
    try:
        rows, written = bench.run(read_dataclass(bench.settings, settings), str(out))  # Hydra reads 2026 as a number
    except RanksFailedError as error:
        print(f"flashcp: error: {error}", file=sys.stderr)
        sys.exit(1)
    named = [vars(row) if dataclasses.is_dataclass(row) else row._asdict() for row in rows]
    show({"rows": named}, bench.table(rows))
    files = [written, *map(written.with_suffix, bench.beside)]
    print(f"wrote {', '.join(map(str, files))}", file=sys.stderr)


def _into_file(
    measure: Callable[[Any], Iterable[Any]],
    write: Callable[[Path, list[Any]], None],
    suffix: str,
    beside: Iterable[str],
    settings: Any,
    out: str,
) -> tuple[list[Any], Path]:
    """Rows written to one file, and those beside it, when all are there."""
    path = Path(out)
    if path.suffix != suffix:
        raise ValueError(f"out={out!r}: expected a file *{suffix}")
    for file in (path, *map(path.with_suffix, beside)):
        check_file(file)
    rows = list(measure(settings))
    write(path, rows)
    return rows, path


def keys(arguments: Sequence[str]) -> str:
    """For --help: the configuration of the benchmark that is named; empty when none is."""
    return f"bench/{arguments[0]}" if arguments[:1] and arguments[0] in BENCHES else ""
