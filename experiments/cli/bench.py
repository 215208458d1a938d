"""`flashcp bench NAME`: benchmarks, one module each, their rows in one CSV each."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from flashcp.experiments.cli.compose import Job, run
from flashcp.experiments.cli.launch import RanksFailedError
from flashcp.experiments.cli.verbs import AS_JSON
from flashcp.experiments.folders import check_file
from flashcp.schema import read_dataclass

__all__ = ["BENCHES", "Bench", "keys", "main"]


Run = Callable[[Any, str], tuple[list[Any], Path]]


class Bench(NamedTuple):
    """A dataclass of what to measure, the keys of conf/bench/NAME.yaml but for `out`; from it and `out` rows (named
    tuples or dataclasses) and the place they were written to; from rows a table. beside: suffixes of files that are
    written beside it.
    """

    settings: type[Any]
    run: Run
    table: Callable[[list[Any]], str]
    beside: tuple[str, ...] = ()


def _planner() -> Bench:
    from flashcp.experiments.bench.planner import PlannerBench, bench_planner, planner_table, write_planner_rows

    return Bench(PlannerBench, _into_file(bench_planner, write_planner_rows), planner_table)


def _awkward() -> Bench:
    from flashcp.experiments.bench.awkward import AwkwardBench, awkward_table, bench_awkward
    from flashcp.experiments.bench.planner import write_planner_rows

    return Bench(AwkwardBench, _into_file(bench_awkward, write_planner_rows), awkward_table)


def _attention() -> Bench:
    from flashcp.experiments.bench.attention import AttentionBench, attention_table, bench_attention

    return Bench(AttentionBench, bench_attention, attention_table)


def _exchange() -> Bench:
    from flashcp.experiments.bench.exchange import ExchangeBench, bench_exchange, exchange_table

    return Bench(ExchangeBench, bench_exchange, exchange_table)


def _lab() -> Bench:
    from flashcp.experiments.lab.cases import LabBench
    from flashcp.experiments.lab.lab import bench_lab, lab_table

    return Bench(LabBench, bench_lab, lab_table)


def _paper_fit() -> Bench:
    from flashcp.experiments.paper.fit import PaperFit, fit_rows, fit_table, write_fit

    return Bench(PaperFit, _into_file(fit_rows, write_fit, ".yaml"), fit_table)


def _calibrate() -> Bench:
    from flashcp.experiments.bench.calibrate import (
        BESIDE,
        CalibrateBench,
        bench_calibrate,
        calibration_table,
        write_calibration,
    )

    into = _into_file(bench_calibrate, write_calibration, ".yaml", BESIDE)
    return Bench(CalibrateBench, into, calibration_table, BESIDE)


BENCHES: dict[str, Callable[[], Bench]] = {
    "planner": _planner,
    "awkward": _awkward,
    "attention": _attention,
    "exchange": _exchange,
    "lab": _lab,
    "paper_fit": _paper_fit,
    "calibrate": _calibrate,
}


def main(arguments: Sequence[str]) -> int:
    """Measure, write to out= (by default below outputs/), print the table or one JSON document."""
    name = arguments[0] if arguments else ""
    if name not in BENCHES:
        raise ValueError(f"bench {name!r}: expected one of {', '.join(BENCHES)}")
    return run(partial(measure, name), f"bench/{name}", arguments[1:])


def measure(name: str, job: Job) -> None:
    """One job of `flashcp bench NAME`."""
    bench, settings = BENCHES[name](), dict(job.settings)
    out = settings.pop("out")
    try:
        rows, written = bench.run(read_dataclass(bench.settings, settings), out)
    except RanksFailedError as error:
        print(f"flashcp: error: {error}", file=sys.stderr)
        sys.exit(1)
    print(_json(rows) if AS_JSON.get() else bench.table(rows))
    files = [written, *map(written.with_suffix, bench.beside)]
    print(f"wrote {', '.join(map(str, files))}", file=sys.stderr)


def _into_file(
    measure: Callable[[Any], Iterable[Any]],
    write: Callable[[Path, list[Any]], None],
    suffix: str = ".csv",
    beside: Iterable[str] = (),
) -> Run:
    """Rows written to one file, and those beside it, when all are there."""

    def into(settings: Any, out: str) -> tuple[list[Any], Path]:
        path = Path(out)
        if path.suffix != suffix:
            raise ValueError(f"out={out!r}: expected a file *{suffix}")
        for file in (path, *map(path.with_suffix, beside)):
            check_file(file)
        rows = list(measure(settings))
        write(path, rows)
        return rows, path

    return into


def _json(rows: list[Any]) -> str:
    return json.dumps({"rows": [_fields(row) for row in rows]}, indent=1, default=dataclasses.asdict)


def _fields(row: Any) -> dict[str, Any]:
    return dataclasses.asdict(row) if dataclasses.is_dataclass(row) else row._asdict()  # type: ignore[arg-type]


def keys(arguments: Sequence[str]) -> str:
    """For --help: the configuration of the benchmark that is named; empty when none is."""
    return f"bench/{arguments[0]}" if arguments[:1] and arguments[0] in BENCHES else ""
