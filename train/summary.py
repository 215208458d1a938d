"""The numbers a run leaves behind: summary.json."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import flashcp

TIMES = ("step_ms", "attention_ms", "exposed_exchange_ms", "wait_ms", "loader_ms", "tokens_per_s")
WARM_UP_STEPS = 2
"""Steps left out of the medians: allocators, caches and the processor's clock settle in them."""


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Losses of every step; medians with p20 and p80 over the steps after warm-up; means of what plans fix.

    rows: metrics of steps 1, 2, ..., at least one. Times are measured, the slowest rank's each step.
    """
    timed = rows[WARM_UP_STEPS:] or rows
    last = rows[-1]
    return {
        "steps": last["step"],
        "final_loss": last["loss"],
        "losses": [row["loss"] for row in rows],
        "step_times_ms": [row["step_ms"] for row in rows],
        **{name: spread([row[name] for row in timed]) for name in TIMES},
        **{name: float(np.mean([row[name] for row in rows])) for name in ("imbalance", "critical_rows", "saving")},
        "imbalance_max": max(row["imbalance"] for row in rows),
        "tokens": sum(row["tokens"] for row in rows),
        "labelled_tokens": sum(row["labelled_tokens"] for row in rows),
        "dropped_tokens": last["dropped_tokens"],
        "carried_tokens": last["carried_tokens"],
        "skipped_records": last["skipped_records"],
    }


def versions(device: torch.device) -> dict[str, str]:
    """What a measured number must carry: device, versions and the date (UTC)."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}",
        "flashcp": flashcp.__version__,
        "torch": torch.__version__,
        "triton": triton,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    unfinished = path.with_name(f"unfinished_{path.name}")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, p20 and p80."""
    p20, median, p80 = np.percentile(values, [20, 50, 80]).tolist()
    return {"p20": p20, "median": median, "p80": p80}
