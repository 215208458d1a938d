"""`flashcp bench NAME`: benchmarks, one module each, their rows in one CSV each."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flashcp.experiments.compose import compose, register_config
from flashcp.experiments.folders import check_out
from flashcp.train.schema import read_dataclass

__all__ = ["BENCHES", "Bench", "keys", "main"]


class Bench(NamedTuple):
    """A dataclass of what to measure; from it rows (named tuples); from them a table, and a file (`suffix`)."""

    settings: type[Any]
    measure: Callable[[Any], Iterable[Any]]
    table: Callable[[list[Any]], str]
    write: Callable[[Path, list[Any]], None]
    suffix: str = ".csv"


def _planner() -> Bench:
    from flashcp.experiments.bench_planner import PlannerBench, bench_planner, planner_table, write_planner_rows

    return Bench(PlannerBench, bench_planner, planner_table, write_planner_rows)


def _awkward() -> Bench:
    from flashcp.experiments.bench_awkward import AwkwardBench, awkward_table, bench_awkward
    from flashcp.experiments.bench_planner import write_planner_rows

    return Bench(AwkwardBench, bench_awkward, awkward_table, write_planner_rows)


def _paper_fit() -> Bench:
    from flashcp.experiments.paper.fit import PaperFit, fit_rows, fit_table, write_fit

    return Bench(PaperFit, fit_rows, fit_table, write_fit, ".yaml")


def _calibrate() -> Bench:
    from flashcp.experiments.bench_calibrate import (
        CalibrateBench,
        bench_calibrate,
        calibration_table,
        write_calibration,
    )

    return Bench(CalibrateBench, bench_calibrate, calibration_table, write_calibration, ".yaml")


BENCHES: dict[str, Callable[[], Bench]] = {
    "planner": _planner,
    "awkward": _awkward,
    "paper_fit": _paper_fit,
    "calibrate": _calibrate,
}


def main(arguments: Sequence[str], as_json: bool = False) -> int:
    """Measure, write out=FILE (by default below outputs/), print the table or one JSON document."""
    name, overrides = _name(arguments)
    bench = BENCHES[name]()
    settings = compose(_config(name, bench), overrides)
    out = Path(settings.pop("out"))
    if out.suffix != bench.suffix:
        raise ValueError(f"out={str(out)!r}: expected a file *{bench.suffix}")
    check_out(out.parent)
    rows = list(bench.measure(read_dataclass(bench.settings, settings)))
    bench.write(out, rows)
    document = {"rows": [row._asdict() for row in rows]}
    print(json.dumps(document, indent=1, default=dataclasses.asdict) if as_json else bench.table(rows))
    print(f"wrote {out}", file=sys.stderr)
    return 0


def keys(arguments: Sequence[str]) -> str:
    """For --help: the configuration of the benchmark that is named; empty when none is."""
    return _config(arguments[0], BENCHES[arguments[0]]()) if arguments[:1] and arguments[0] in BENCHES else ""


def _name(arguments: Sequence[str]) -> tuple[str, list[str]]:
    names = [argument for argument in arguments if "=" not in argument]
    if len(names) != 1 or names[0] not in BENCHES:
        raise ValueError(f"bench {' '.join(names)!r}: expected one of {', '.join(BENCHES)}")
    return names[0], [argument for argument in arguments if "=" in argument]


def _config(name: str, bench: Bench) -> str:
    """The benchmark's settings and `out`, as a configuration in the ConfigStore. Returns its name."""
    out = ("out", str, dataclasses.field(default=f"outputs/bench/{name}{bench.suffix}"))
    register_config(f"bench_{name}", dataclasses.make_dataclass("Settings", [out], bases=(bench.settings,)))
    return f"bench_{name}"
