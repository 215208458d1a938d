"""What the ranks of a lab wrote, as rows and tables: predicted and measured side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashcp.experiments.bench.harness import spread
from flashcp.experiments.lab.cases import LabBench
from flashcp.experiments.lab.faults import STATES, CutSeen
from flashcp.experiments.lab.scale import Scale
from flashcp.experiments.sweep.compare import spread_tells
from flashcp.experiments.sweep.results import Number, Row, to_row
from flashcp.simulator.summary import BASELINE
from flashcp.text import table


@dataclass(frozen=True)
class _Measured:
    """What ranks wrote of one method. ms: [batches, turns]. sent, routed: bytes [batches, nodes]."""

    ms: np.ndarray
    sent: np.ndarray
    routed: np.ndarray


def measured(records: Sequence[dict[str, Any]]) -> dict[str, _Measured]:
    """By method, in the order of the records."""
    found = {}
    batches = [record for record in records if "batch" in record]
    for method in dict.fromkeys(record["method"] for record in batches):
        mine = [record for record in batches if record["method"] == method]
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
    kind = f"emulated: {scale}"

    def row(provider: str, metric: str, unit: str, numbers: tuple[float | None, float, float | None], kind: str) -> Row:
        p20, median, p80 = numbers
        return to_row(bench.case, Number(provider, metric, unit, p20, median, p80), _device(bench), kind)

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
            row(method, "module_ms", "ms", spread(numbers.ms), over),
            row(method, "speedup", "x", spread(base / numbers.ms), over),
            row(method, "predicted_ms", "ms", spread(ms), "simulated"),
            row(method, "predicted_speedup", "x", spread(base_predicted / ms), "simulated"),
            row(method, "link_mb", "MB", (None, float(numbers.sent.sum()) / 1e6, None), over),
            row(method, "route_mb", "MB", (None, float(numbers.routed.sum()) / 1e6, None), over),
        ]
    return rows


def fault_rows(
    bench: LabBench, scale: Scale, cuts: dict[str, list[CutSeen]], records: Sequence[dict[str, Any]]
) -> list[Row]:
    """whole_ms, half_ms, tenth_ms: a window while one node's link carries that share of its rate. cut_s: from a cut in
    mid-step until the last rank had an error; silent: ranks that never had one."""
    rows = []
    for method, seen in cuts.items():
        states = {
            record["state"]: record["ms"] for record in records if record.get("method") == method and "state" in record
        }
        numbers = [Number(method, f"{state}_ms", "ms", None, ms, None) for state, ms in states.items()]
        numbers.append(Number(method, "cut_s", "s", None, max((one.after_s for one in seen), default=0.0), None))
        numbers.append(Number(method, "silent", "ranks", None, bench.world_size - len(seen), None))
        rows += [to_row(bench.case, number, _device(bench), f"emulated: {scale}") for number in numbers]
    return rows


def training_rows(bench: LabBench, scale: Scale, numbers: Sequence[Number]) -> list[Row]:
    """Numbers of `training.py` with what they must carry."""
    kind = f"emulated: {scale}; {bench.train_steps} steps of a small model"
    return [to_row(bench.case, number, _device(bench), kind) for number in numbers]


def _device(bench: LabBench) -> str:
    return f"CPU, {os.cpu_count()} cores; {bench.cores / bench.world_size:.3g} of a core a rank"


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
    return f"{rows[0].case}\n{about}\n{table(head, body)}{_training_table(rows)}{_fault_table(rows)}"


def _training_table(rows: Sequence[Row]) -> str:
    """Whole steps; empty where nothing was trained."""
    found = {(row.provider, row.metric): row for row in rows}
    methods = [row.provider for row in rows if row.metric == "train_step_ms"]
    if not methods:
        return ""
    head = ["method", "step ms", f"speedup over {BASELINE}", "largest difference of a loss to one process alone"]
    body = [
        [
            method,
            f"{found[method, 'train_step_ms'].median:.0f}",
            speedup_text(found[method, "train_speedup"]),
            f"{found[method, 'loss_difference'].median:.1e}",
        ]
        for method in methods
    ]
    return f"\n\n{table(head, body)}"


def _fault_table(rows: Sequence[Row]) -> str:
    """What methods made of faults; empty where none met any."""
    metrics = [*(f"{state}_ms" for state in STATES), "cut_s", "silent"]
    found = {(row.provider, row.metric): row.median for row in rows if row.metric in metrics}
    methods = dict.fromkeys(provider for provider, _ in found)
    if not methods:
        return ""
    head = ["method", *(f"ms, one link {state}" for state in STATES), "s until a cut is an error", "silent ranks"]
    body = [[method, *(f"{found[method, metric]:.3g}" for metric in metrics)] for method in methods]
    return f"\n\n{table(head, body)}"


def speedup_text(row: Row) -> str:
    """`1.24 (1.19 - 1.31)`, or that the turns do not tell the two apart."""
    if row.provider == BASELINE:
        return "1"
    assert row.p20 is not None
    assert row.p80 is not None
    spread = f"({row.p20:.2f} - {row.p80:.2f})"
    return f"{row.median:.2f} {spread}" if spread_tells(row.p20, row.p80) else f"not told apart {spread}"
