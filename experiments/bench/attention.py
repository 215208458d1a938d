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
from typing import Annotated

import torch

from flashcp.experiments.bench.attention_cases import OURS
from flashcp.experiments.bench.attention_peers import PEERS
from flashcp.experiments.campaign.part import PARTS, load
from flashcp.experiments.campaign.watch import run_part
from flashcp.experiments.folders import check_out
from flashcp.experiments.sweep.results import Row
from flashcp.limits import Limit


@dataclass
class AttentionBench:
    """minutes: cases that begin later than this are left out. cases: only those whose name holds this text."""

    minutes: Annotated[float, Limit(lambda value: 0 < value < float("inf"), "a number > 0")] = 8.0
    cases: str = ""


def bench_attention(bench: AttentionBench, out: str) -> tuple[list[Row], Path]:
    """The part `attention` of the campaign, and figures of it.

    out: directory; auto: experiments/results/<device>/attention of this checkout. Returns the rows and that directory.
    Raises ValueError, before anything is written, where there is no GPU or no such case.
    """

    if not torch.cuda.is_available():
        raise ValueError("attention is measured on a GPU, and torch sees none here")
    labels = [case.label for case in load(PARTS["attention"]).cases(False)]
    if not any(bench.cases in label for label in labels):
        raise ValueError(f"cases={bench.cases!r}: expected a part of one of {', '.join(labels)}")
    device = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()).strip("_")
    results = Path(__file__).resolve().parents[1] / "results"
    folder = results / device / "attention" if out == "auto" else Path(out)
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
        shown = []
        for peer in PEERS:
            rates = [cells.get((case, peer, key)) for key in keys]
            if rates[0] is not None:
                shown.append(f"{peer} {'/'.join('-' if rate is None else f'{rate:.0f}' for rate in rates)}")
        if not shown:
            others = [row for row in rows if row.case == case and row.unit.endswith("/s")]
            shown = [f"{row.provider} {row.median:.0f} {row.unit}" for row in others]
        error = cells.get((case, OURS, "relative_error"))
        told = "" if error is None else f"error {error:.1e}"
        lines.append(f"{case:<42} {told:<13}  {'  '.join(shown)}".rstrip())
    return "\n".join(lines)
