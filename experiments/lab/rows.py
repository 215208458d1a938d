"""What the ranks of a lab wrote, as rows: predicted and measured side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashcp.experiments.bench.harness import spread
from flashcp.experiments.lab.cases import LabBench
from flashcp.experiments.lab.faults import CutSeen
from flashcp.experiments.lab.scale import Scale
from flashcp.experiments.lab.tables import TAKEN
from flashcp.experiments.sweep.results import Number, Row, to_row
from flashcp.simulator.summary import BASELINE


@dataclass(frozen=True)
class _Measured:
    """What ranks wrote of one method, turn after turn. ms: [turns]. sent, routed: bytes [turns, nodes]."""

    ms: np.ndarray
    sent: np.ndarray
    routed: np.ndarray


def measured(records: Sequence[dict[str, Any]]) -> dict[str, _Measured]:
    """By method, in the order of the records."""
    timed = sorted((record for record in records if "turn" in record), key=lambda record: record["turn"])
    found = {}
    for method in dict.fromkeys(record["method"] for record in records if "turn" in record):
        mine = [record for record in timed if record["method"] == method]
        found[method] = _Measured(
            *(np.array([one[key] for one in mine]) for key in ("ms", "sent_bytes", "route_bytes"))
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
        row("lab", TAKEN, "cores", (None, max(record[TAKEN] for record in records if TAKEN in record), None), kind),
        row("lab", "latency_us", "us", (None, scale.rates.latency_us, None), kind),
        row("lab", "socket_gbps", "GB/s", (None, scale.rates.socket_gbps, None), kind),
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
