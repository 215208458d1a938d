"""Whose checkpoint is whose: a run keeps what it came from and what others wrote, and `latest` follows who wrote last.

    out/checkpoints/step_00000010     a checkpoint; its identity.json says which lineage wrote it
    out/checkpoints/step_00000010_2   the same step, written by a lineage that went back before it
    out/latest.json                   the checkpoint that `checkpoint.resume=latest` means, and its lineage
    out/metrics.jsonl                 the rows of that lineage; out/metrics_LINEAGE.jsonl: of one that was left

A run that goes on from the latest checkpoint belongs to its lineage. One that goes on from any other begins its own.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from flashcp.files import read_bounded
from flashcp.sharding.values import shown
from flashcp.train.checksums import IDENTITY, parse_json, read_identity
from flashcp.train.summary import write_json

LATEST = "latest.json"
METRICS = "metrics.jsonl"
UNFINISHED = "unfinished_"


class Latest(NamedTuple):
    """What `checkpoint.resume=latest` goes on from, and the lineage that went on from it or wrote it."""

    checkpoint: Path
    lineage: str


def find_latest(out: Path) -> Path | None:
    """The checkpoint that `checkpoint.resume=latest` means; None where `out` has none.

    Raises ValueError, naming those that are there, when it cannot be told.
    """
    latest, there = _read_latest(out), _kept(out)
    if not latest and not there:
        return None
    if not latest or not (latest.checkpoint / IDENTITY).is_file():
        names = f"names {shown(str(latest.checkpoint))}, where none is" if latest else "is gone"
        others = ", ".join(str(path) for path in there[-3:]) or "none here"
        raise ValueError(f"{out / LATEST} {names}; checkpoint.resume= takes a path: {others}")
    return latest.checkpoint


def _read_latest(out: Path) -> Latest | None:
    place = out / LATEST
    try:
        content = parse_json(read_bounded(place, LATEST, most_mib=1)) if place.exists() else None
        if not content:
            return None
        checkpoint = out / content["checkpoint"]
        checkpoint.exists()  # raises OSError for a name that no file can have
        return Latest(checkpoint, _checked(content["lineage"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        why = error.strerror if isinstance(error, OSError) else error  # whose own text has the whole name
        raise ValueError(f"{place}: cannot be read ({why}); checkpoint.resume= takes a path, too") from error


def _kept(out: Path) -> list[Path]:
    """Whole checkpoints of all lineages in `out`, by step."""
    return sorted(path.parent for path in out.glob(f"checkpoints/step_*/{IDENTITY}"))


def _lineage_of(checkpoint: Path) -> str:
    """Who wrote a checkpoint; empty where that cannot be read."""
    try:
        return _checked(read_identity(checkpoint)["lineage"])
    except (ValueError, TypeError, KeyError):
        return ""


def _checked(lineage: str) -> str:
    """A lineage's name, which becomes part of a file's."""
    if not re.fullmatch("[0-9a-f]{8}", lineage):
        raise ValueError(f"{shown(lineage)} names no lineage")
    return lineage


def free_name(path: Path) -> Path:
    """The path, or with _2, _3, ... after it where something is there."""
    names = itertools.chain([path], (path.with_name(f"{path.name}_{number}") for number in itertools.count(2)))
    return next(name for name in names if not name.exists())


@dataclass
class Lineage:
    """A run that writes checkpoints into `out`. source: the checkpoint that it goes on from, if any."""

    out: Path
    source: Path | None = None
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:8])

    def begin(self) -> None:
        """Before the first step, on rank 0: `latest` means this run's source from here on, and metrics.jsonl holds the
        rows of the source's lineage."""
        latest = _read_latest(self.out)
        if self.source is None:
            (self.out / LATEST).unlink(missing_ok=True)
        elif latest and latest.checkpoint.resolve() == self.source.resolve():
            self.name = latest.lineage
        else:
            if latest:
                self._take_up_rows(latest.lineage, _lineage_of(self.source))
            self._point_to(self.source)

    def place(self, step: int) -> Path:
        """Where to write the checkpoint of a step: a name that is free."""
        return free_name(self.out / "checkpoints" / f"step_{step:08d}")

    def publish(self, unfinished: Path, path: Path, keep: int) -> None:
        """Give a whole checkpoint its name and let `latest` mean it; of this lineage's own no more than `keep` stay,
        and its source."""
        os.rename(unfinished, path)
        self._point_to(path)
        own = [old for old in _kept(self.out) if _lineage_of(old) == self.name]
        for old in own[:-keep]:
            if self.source is None or old.resolve() != self.source.resolve():
                os.rename(old, old.with_name(UNFINISHED + old.name))  # what is half removed is no checkpoint
        self.tidy()

    def tidy(self) -> None:
        """Remove what was begun and did not become whole."""
        for left in self.out.glob(f"checkpoints/{UNFINISHED}*"):
            shutil.rmtree(left)

    def _point_to(self, checkpoint: Path) -> None:
        place = checkpoint.resolve()
        if place.is_relative_to(self.out.resolve()):  # a folder that is moved takes its own along
            place = place.relative_to(self.out.resolve())
        write_json(self.out / LATEST, {"checkpoint": str(place), "lineage": self.name})

    def _take_up_rows(self, left: str, taken_up: str) -> None:
        rows, earlier = self.out / METRICS, self.out / f"metrics_{taken_up}.jsonl"
        if rows.exists():
            shutil.copyfile(rows, self.out / f"metrics_{left}.jsonl")
        if left != taken_up:
            rows.unlink(missing_ok=True)
            if earlier.exists():
                shutil.copyfile(earlier, rows)
