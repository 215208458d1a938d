"""results.csv: one row, one number, with everything a number must carry. Reports are built from it alone.

Needs no pandas, hydra or matplotlib: a GPU machine that measures has none of them.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flashcp.experiments.folders import write_whole
from flashcp.sharding.values import first_line

if TYPE_CHECKING:
    import torch

RESULTS = "results.csv"
KEPT = "experiments/results"
"""Where a checkout keeps results."""
WINDOWS = "windows"
"""Metric: how many packs the other numbers of a case are over."""
FAILED = "failed"
"""Metric of a provider that did not come through a case; the row's `kind` says why."""
LEFT_OUT = "left out"
"""Metric of a provider that cannot be compared in a case; the row's `kind` says why."""
MEASURED, EMULATED = "measured", "emulated"
"""Kinds of a training run's rows: as this machine is, or with a link that was slowed (and how)."""
TURN_MS, TURNS = "turn_ms", "turns"
"""Metrics of runs that took turns: the step of each turn, and when their turns began, which tells whose they were."""
REFERENCE = "single_process"
"""Provider of the run of the same packs on one process, which the others' losses are compared with."""
NO_OVERLAP = "none"
"""Provider, and the baseline, of a sweep whose lines are levels of overlap."""
LONGEST = 240  # characters of a reason
SUMMARY = ["step_ms", "attention_ms", "exposed_exchange_ms", "wait_ms", "loader_ms", "tokens_per_s"]
SUMMARY += ["imbalance", "imbalance_max", "critical_rows", "saving", "final_loss", "tokens"]
"""The metrics of a training run."""
UNITS = {"ms": "ms", "mib": "MiB", "rows": "rows", "tokens": "tokens", "s": "tokens/s", "loss": "nats"}
UNITS |= {"saving": "share", "imbalance": "max/mean", "max": "max/mean"}
"""By the last word of a metric's name; others are ratios."""
LEVELS = ("none", "staged", "fused")
SIGNED = {"saving", *(f"exposed_{level}_ms" for level in LEVELS), *(f"hidden_{level}" for level in LEVELS)}
"""Metrics that may be below 0: an exchange can move more rows than the all-gather, and a time can differ from another
by less than both vary."""


@dataclass(frozen=True)
class Row:
    """One number. median: over a run's steps after warm-up, or the number itself where there is one (p20, p80 None).

    case: the work. provider: the method. step: of `loss` and `turn_ms`, else None. kind: `measured`,
    `simulated`, both in words, `emulated: ` and how, `left out: ` and why, or `failed: ` and why.
    config: digest of the run's configuration; reference: of the single-process run of the same packs, or empty.
    """

    case: str
    provider: str
    metric: str
    unit: str
    step: int | None
    p20: float | None
    median: float
    p80: float | None
    device: str
    versions: str
    commit: str
    date: str
    kind: str
    config: str = ""
    reference: str = ""


class Number(NamedTuple):
    """One number of a case, as a benchmark yields it. median: or the number itself, where there is one (p20, p80
    None)."""

    provider: str
    metric: str
    unit: str
    p20: float | None
    median: float
    p80: float | None


class Failure(NamedTuple):
    """Somebody did not come through. reason: one line."""

    provider: str
    reason: str


def label(kind: str) -> str:
    """The first word or two of a row's kind, without how and why."""
    return kind.partition(":")[0]


def unit(metric: str) -> str:
    """What a metric of a run or of a simulation is counted in."""
    return UNITS.get(metric.rpartition("_")[2], "ratio")


def digest(value: Any, size: int = 4) -> str:
    """Of plain values, in hex digits, two a byte of `size`."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=size).hexdigest()


def left_out_row(case: str, provider: str, why: str, config: str) -> Row:
    """A provider that is not compared in a case, and why. config: digest of the run that was not made."""
    left_out = to_row(case, Number(provider, LEFT_OUT, "1", None, 1.0, None), "none", f"{LEFT_OUT}: {why}")
    return dataclasses.replace(left_out, config=config)


def reason(failure: BaseException) -> str:
    """What an exception says, on one line and not too long, or its name."""
    return (" ".join(str(failure).split()) or type(failure).__name__)[:LONGEST]


def check_device(device: torch.device) -> None:
    """Raise RuntimeError where a GPU takes no more work: every later call of this process would fail as the last."""
    if device.type != "cuda":
        return
    import torch

    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except Exception as failure:
        raise RuntimeError(f"the GPU takes no more work from this process: {reason(failure)}") from failure


def versions() -> str:
    """Of what decides a kernel's time."""
    import torch
    import triton

    from flashcp import __version__

    return f"flashcp {__version__}, torch {torch.__version__}, triton {triton.__version__}"


def to_row(
    case: str, found: Number | Failure, device: str, kind: str = "measured", of_commit: str = "", of_versions: str = ""
) -> Row:
    """With all that a row must carry, today. device: its name. of_commit: where the checkout has no git to ask.
    of_versions: where others than `versions()` decide the number."""
    carried = (device, of_versions or versions(), of_commit or commit(), datetime.now(UTC).date().isoformat())
    if isinstance(found, Failure):
        kind = f"{FAILED}: {' '.join(found.reason.split())[:LONGEST]}"
        found = Number(found.provider, FAILED, "1", None, 1.0, None)
    return Row(case, found.provider, found.metric, found.unit, None, *found[3:], *carried, kind)


def summary_rows(case: str, provider: str, config: str, summary: Mapping[str, Any]) -> list[Row]:
    """The rows of a training run, from its summary.json; `reference` is still empty."""
    made, how = summary["versions"], summary["emulated"]
    kind = f"{EMULATED}: {how}" if how else MEASURED
    carried = (made["device"], versions_text(made), commit(), made["date"], kind, config)

    def row(metric: str, unit: str, value: Any, step: int | None = None) -> Row:
        one: Mapping[str, Any] = value if isinstance(value, Mapping) else {"median": float(value)}
        return Row(case, provider, metric, unit, step, one.get("p20"), one["median"], one.get("p80"), *carried)

    numbers = [row(metric, unit(metric), summary[metric]) for metric in SUMMARY]
    numbers += [row("loss", "nats", loss, step) for step, loss in enumerate(summary["losses"], start=1)]
    if turns := summary.get("turns"):
        numbers.append(row(TURNS, "s since 1970", turns["begun"]))
        numbers += [row(TURN_MS, "ms", time, step) for step, time in enumerate(summary["step_times_ms"], start=1)]
    return numbers


def read_rows(folder: Path) -> list[Row]:
    """The rows of a sweep's directory, none when it has no results.csv. Raises ValueError for another table."""
    path = folder / RESULTS
    if not path.is_file():
        return []
    names = [field.name for field in dataclasses.fields(Row)]
    with path.open(encoding="utf-8", newline="") as lines:
        table = csv.DictReader(lines)
        try:
            found = table.fieldnames
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: not a file of results ({first_line(error)})") from error
        if found != names:
            raise ValueError(f"{path}: expected the columns {', '.join(names)}")
        try:
            return [_parse(line) for line in table]
        except (TypeError, ValueError, csv.Error) as error:
            raise ValueError(f"{path}:{table.line_num}: not a row of results ({first_line(error)})") from error


def write_rows(folder: Path, rows: Iterable[Row], name: str = RESULTS) -> None:
    """Write results.csv, or a file of that name, whole or not at all."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([field.name for field in dataclasses.fields(Row)])
    table.writerows(dataclasses.astuple(row) for row in rows)
    write_whole(folder / name, text.getvalue())


def _parse(line: dict[str, Any]) -> Row:
    """Numbers are finite, and below 0 only where one can be."""
    if None in line or None in line.values():
        raise ValueError("expected one value a column")
    given = {name: line[name] for name in ("median", "p20", "p80") if line[name] or name == "median"}
    numbers: dict[str, Any] = {"p20": None, "p80": None, **{name: float(text) for name, text in given.items()}}
    for name, text in given.items():
        if not math.isfinite(numbers[name]) or (numbers[name] < 0 and line["metric"] not in SIGNED):
            raise ValueError(f"{name}={text}: expected a finite number >= 0")
    return Row(**{**line, **numbers, "step": int(line["step"]) if line["step"] else None})


# --- what every kept number carries: commit and versions


@cache
def commit() -> str:
    """Short hash of the checkout this runs from, `+changes` when files differ from it; `none` outside one.

    Results do not count: writing them is what a run is for.
    """
    head = _git("rev-parse", "--short=10", "HEAD")
    if not head:
        return "none"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(exclude,top){KEPT}")
    return f"{head}+changes" if changed else head


def versions_text(versions: Mapping[str, str]) -> str:
    """`flashcp 0.1.0, torch 2.13.0, ...` of a summary's versions."""
    return ", ".join(f"{name} {version}" for name, version in versions.items() if name not in ("device", "date"))


def _git(*arguments: str) -> str:
    """Output of git in this file's checkout; empty where there is no git, or a git that knows nothing of it."""
    root = Path(__file__).resolve().parents[2]
    try:
        if not (root / "pyproject.toml").is_file():
            return ""
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
