"""`flashcp bench lab`: attention under every method on an emulated cluster, predicted first and then measured.

The lab is built, its rates are measured, its links get the rates of a cluster's, the simulator says what will come, the
ranks run, and everything is taken down. Rows, table and picture tell predicted and measured times side by side.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flashcp.experiments.cli.launch import BAD_INPUT, RanksFailedError
from flashcp.experiments.folders import check_out
from flashcp.experiments.lab.cases import BASELINE, LabBench
from flashcp.experiments.lab.nodes import LabError, Link, Node, built_nodes
from flashcp.experiments.lab.predict import Rates, lab_machine, predicted_ms
from flashcp.experiments.lab.start import run_on_nodes
from flashcp.experiments.sweep.compare import ALIKE
from flashcp.experiments.sweep.results import Number, Row, to_row, write_rows
from flashcp.text import table
from flashcp.train.link import cluster_rates

__all__ = ["OUT", "bench_lab", "lab_table"]

OUT = "outputs/bench/lab"
FREE = Link(50.0)
"""A link that holds nothing back here."""
DTYPE_BYTES = 2
"""Of a number on the cluster that is emulated; the lab's numbers are fp32."""


def bench_lab(bench: LabBench, out: str) -> tuple[list[Row], Path]:
    """Build, predict, measure, take down. Returns the rows and their directory.

    Raises ValueError for bad input, RanksFailedError where no lab can be built or a rank fails.
    """
    bench.check()
    folder = Path(out)
    check_out(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings, records = folder / "settings.json", folder / "records.jsonl"
    settings.write_text(json.dumps(dataclasses.asdict(bench)))
    records.write_text("")
    try:
        with built_nodes(bench.nodes, bench.ranks_per_node, dataclasses.replace(FREE, delay_us=bench.delay_us),
                         bench.cores) as nodes:  # fmt: skip
            ranks = _Ranks(bench, nodes, settings, records)
            print(f"{bench.case}: measuring the ranks' rates", file=sys.stderr)
            ranks.run("rate")
            scale = Scale.of(bench, Rates(**_read(records)[0]))
            print(f"emulated: {scale}", file=sys.stderr)
            for node in nodes:
                node.shape(scale.link_gbps)
            predicted = predict(bench, scale)
            (folder / "predicted.json").write_text(json.dumps(predicted, indent=1))
            print(f"predicted: {folder / 'predicted.json'}; now measuring", file=sys.stderr)
            ranks.run("run")
    except LabError as error:
        raise RanksFailedError(str(error)) from error
    rows = list(lab_rows(bench, scale, predicted, _read(records)))
    write_rows(folder, rows)
    from flashcp.experiments.lab.picture import draw_lab  # late: matplotlib

    draw_lab(rows, folder / "lab.png")
    return rows, folder


@dataclass(frozen=True)
class Scale:
    """What makes the lab's links those of a cluster: as many bytes an operation as there.

    link_gbps: GB/s of a node's link.
    """

    bench: LabBench
    rates: Rates
    link_gbps: float

    @classmethod
    def of(cls, bench: LabBench, rates: Rates) -> Scale:
        if bench.link == "free":
            return cls(bench, rates, FREE.gbps)
        gbps, tflops = cluster_rates(bench.link)
        wider = bench.shape.dtype_bytes / DTYPE_BYTES
        return cls(bench, rates, gbps * rates.tflops / tflops * bench.shrink * wider * bench.ranks_per_node)

    def __str__(self) -> str:
        if self.bench.link == "free":
            return f"free links, {self.rates.tflops:.3g} TFLOP/s of attention a rank"
        gbps, tflops = cluster_rates(self.bench.link)
        return (
            f"a node's link carries {1e3 * self.link_gbps:.3g} MB/s = {gbps:g} GB/s of a rank of {self.bench.link} x "
            f"{self.rates.tflops:.3g} TFLOP/s of attention measured here / {tflops:.4g} there x "
            f"{self.bench.ranks_per_node} ranks x {self.bench.shrink} for shorter windows x "
            f"{self.bench.shape.dtype_bytes / DTYPE_BYTES:g} for fp32"
        )


class _Ranks:
    """Starts the ranks of every node for one step after another."""

    def __init__(self, bench: LabBench, nodes: Sequence[Node], settings: Path, records: Path) -> None:
        self.bench, self.nodes, self.files = bench, nodes, [settings.absolute(), records.absolute()]

    def run(self, step: str) -> None:
        """Raises ValueError for bad input that the ranks find, RanksFailedError where one fails."""
        arguments = ["-m", "flashcp.experiments.lab.rank", step, *map(str, self.files)]
        log = self.files[0].with_name(f"{step}.log")
        outcome = run_on_nodes(self.nodes, self.bench.ranks_per_node, arguments, log, self._watch(step))
        if outcome.code:
            raise ValueError(outcome.error) if outcome.code == BAD_INPUT else RanksFailedError(outcome.error)

    def _watch(self, step: str) -> Callable[[], None]:
        """A bar over the batches that were measured."""
        if step == "rate":
            return lambda: None
        from tqdm import tqdm

        bar = tqdm(total=len(self.bench.batches), unit="batch", file=sys.stderr)

        def look() -> None:
            done = {record["batch"] for record in _read(self.files[1]) if "ms" in record}
            bar.update(max(0, len(done) - 1 - bar.n))

        return look


def _read(records: Path) -> list[dict[str, Any]]:
    """The records that are whole."""
    lines = records.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def predict(bench: LabBench, scale: Scale) -> dict[str, list[float]]:
    """Milliseconds of each method, batch by batch, as the simulator has them."""
    machine = lab_machine(bench, scale.rates, scale.link_gbps)
    each = [predicted_ms(bench, machine, bench.work(batch)) for batch in bench.batches]
    return {method: [one[method] for one in each] for method in each[0]}


@dataclass(frozen=True)
class _Measured:
    """What ranks wrote of one method. ms: [batches, turns]. sent, routed: bytes [batches, nodes]."""

    ms: np.ndarray
    sent: np.ndarray
    routed: np.ndarray

    @cached_property
    def spread(self) -> tuple[float, float, float]:
        return _spread(self.ms)


def measured(records: Sequence[dict[str, Any]]) -> dict[str, _Measured]:
    """By method, in the order of the records."""
    found = {}
    for method in dict.fromkeys(record["method"] for record in records if "method" in record):
        mine = [record for record in records if record.get("method") == method]
        timed = {(record["batch"], record["turn"]): record["ms"] for record in mine if "ms" in record}
        counted = [record for record in mine if "sent_bytes" in record]
        turns = 1 + max(turn for _, turn in timed)
        found[method] = _Measured(
            np.array([timed[key] for key in sorted(timed)]).reshape(-1, turns),
            np.array([record["sent_bytes"] for record in counted]),
            np.array([record["route_bytes"] for record in counted]),
        )
    return found


def lab_rows(
    bench: LabBench, scale: Scale, predicted: dict[str, list[float]], records: Sequence[dict[str, Any]]
) -> list[Row]:
    """Every number with what it must carry.

    module_ms: of the slowest rank, forward and backward, over windows and turns. speedup: the ratio to the baseline
    within a turn. predicted_ms, predicted_speedup: the simulator's, over windows. link_mb: that left all nodes, headers
    counted; route_mb: what the plans say.
    """
    kind, device = (
        f"emulated: {scale}",
        f"CPU, {os.cpu_count()} cores; {bench.cores / bench.world_size:.3g} of a core a rank",
    )

    def row(provider: str, metric: str, unit: str, numbers: tuple[float | None, float, float | None], kind: str) -> Row:
        p20, median, p80 = numbers
        return to_row(bench.case, Number(provider, metric, unit, p20, median, p80), device, kind)

    found = measured(records)
    transports = {record["gate"]: record["transport"] for record in records if "gate" in record}
    rows = [
        row("lab", "link_gbps", "GB/s", (None, scale.link_gbps, None), kind),
        row("lab", "attention_tflops", "TFLOP/s", (None, scale.rates.tflops, None), kind),
        row("lab", "latency_us", "us", (None, scale.rates.latency_us, None), kind),
    ]
    base, base_predicted = found[BASELINE].ms, np.array(predicted[BASELINE])
    for method, numbers in found.items():
        over = f"{kind}; over {transports[method]}"
        ms = np.array(predicted[method])
        rows += [
            row(method, "module_ms", "ms", _spread(numbers.ms), over),
            row(method, "speedup", "x", _spread(base / numbers.ms), over),
            row(method, "predicted_ms", "ms", _spread(ms), "simulated"),
            row(method, "predicted_speedup", "x", _spread(base_predicted / ms), "simulated"),
            row(method, "link_mb", "MB", (None, float(numbers.sent.sum()) / 1e6, None), over),
            row(method, "route_mb", "MB", (None, float(numbers.routed.sum()) / 1e6, None), over),
        ]
    return rows


def _spread(values: np.ndarray) -> tuple[float, float, float]:
    """p20, median, p80."""
    p20, median, p80 = np.percentile(values, [20, 50, 80]).tolist()
    return p20, median, p80


def lab_table(rows: list[Row]) -> str:
    """A line a method: measured beside predicted."""
    by_name = {(row.provider, row.metric): row for row in rows}
    body = []
    for method in dict.fromkeys(row.provider for row in rows if row.metric == "speedup"):
        ms, speedup, predicted, sent, routed = (
            by_name[method, metric] for metric in ("module_ms", "speedup", "predicted_speedup", "link_mb", "route_mb")
        )
        over = f"{sent.median / routed.median - 1:+.1%}" if routed.median else ""
        numbers = [f"{ms.median:.0f}", speedup_text(speedup), f"{predicted.median:.2f}"]
        body.append([method, *numbers, f"{sent.median:.1f}", f"{routed.median:.1f}", over])
    head = ["method", "module ms", f"speedup over {BASELINE}", "predicted", "MB on links", "MB of routes", "more"]
    about = by_name[BASELINE, "module_ms"].kind.partition("; over")[0]
    return f"{rows[0].case}\n{about}\n{table(head, body)}"


def speedup_text(row: Row) -> str:
    """`1.24 (1.19 - 1.31)`, or that the turns do not tell the two apart."""
    if row.provider == BASELINE:
        return "1"
    assert row.p20 is not None
    assert row.p80 is not None
    spread = f"({row.p20:.2f} - {row.p80:.2f})"
    apart = row.p20 > ALIKE or row.p80 < 1 / ALIKE
    return f"{row.median:.2f} {spread}" if apart else f"not told apart {spread}"
