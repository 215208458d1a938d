"""Attention of one device beside every peer that is installed: `flashcp bench attention`.

For each case every provider is first checked against float64, then all that are right are timed in turns, the L2 cache
flushed before each measurement. What fails is a row with its reason, and costs no other provider its own. Rows and
figures go to `experiments/results/<device>/attention/`. A case that would not fit in the time is left out and said.
Where hydra is not installed: `python -m flashcp.experiments.campaign attention`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flashcp.experiments.bench.attention_cases import OURS
from flashcp.experiments.bench.attention_peers import PEERS
from flashcp.experiments.folders import check_out
from flashcp.experiments.sweep.results import Row

__all__ = ["AttentionBench", "attention_table", "bench_attention"]


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
    from flashcp.experiments.campaign.part import PARTS, load
    from flashcp.experiments.campaign.watch import run_part

    if not 0 < bench.minutes < float("inf"):
        raise ValueError(f"minutes={bench.minutes}: expected a number > 0")
    if not torch.cuda.is_available():
        raise ValueError("attention is measured on a GPU, and torch sees none here")
    labels = [case.label for case in load(PARTS["attention"]).cases(False)]
    if not any(bench.cases in label for label in labels):
        raise ValueError(f"cases={bench.cases!r}: expected a part of one of {', '.join(labels)}")
    folder = Path(out) if out else results_folder(torch.cuda.get_device_name())
    check_out(folder)
    rows = run_part(PARTS["attention"], folder, 60 * bench.minutes, cases=bench.cases).rows
    from flashcp.experiments.plots import draw_rates  # late: the campaign's machines may have no matplotlib

    draw_rates(rows, folder)
    return rows, folder


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


def results_folder(device_name: str) -> Path:
    """experiments/results/<device>/attention of this checkout."""
    device = re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")
    return Path(__file__).resolve().parents[1] / "results" / device / "attention"
