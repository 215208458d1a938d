"""Faults on links, while attention runs: a link at half its rate, at a tenth, and a node that is cut off in mid-step.

The ranks ask for the next state of the links (`LabRank.meet_faults`) and go on when the lab has made it; the cut comes
while they compute.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flashcp.experiments.lab.cases import LabBench
from flashcp.experiments.lab.nodes import Node
from flashcp.experiments.sweep.results import Number, Row

STATES = {"whole": 1.0, "half": 0.5, "tenth": 0.1}
"""The share of its rate that the link of the last node carries."""
CUT = "cut"
CALLS = 3
LOOK_S = 0.02


class CutSeen(NamedTuple):
    """What a rank made of the cut. after_s: seconds from the cut to the error. said: its message."""

    rank: int
    after_s: float
    said: str


class Answering:
    """The lab's part, called a few times a second: makes the states that ranks ask for. cut_at: time of the cut.

    The node is joined again when all ranks have noticed: torchrun's agents wait minutes for one that is gone.
    """

    def __init__(self, nodes: Sequence[Node], link_gbps: float, world_size: int, records: Path) -> None:
        self._node, self._link_gbps, self._question = nodes[-1], link_gbps, question(records)
        self._noticed = noticed(records, world_size)
        for file in (self._question, *self._noticed):  # of a run that was killed
            file.unlink(missing_ok=True)
        self.cut_at = 0.0

    def __call__(self) -> None:
        if self.cut_at and all(file.exists() for file in self._noticed):
            self._node.join()
        if not self._question.exists():
            return
        state = self._question.read_text()
        if state == CUT:
            self._node.cut()
            self.cut_at = time.time()
        elif state in STATES:
            self._node.shape(STATES[state] * self._link_gbps)
        self._question.unlink()


def cuts_seen(bench: LabBench, records: Path, cut_at: float) -> list[CutSeen]:
    """What each rank said, in rank order; a rank that said nothing is left out."""
    found = []
    for file in noticed(records, bench.world_size):
        if file.exists():
            seen: dict[str, Any] = json.loads(file.read_text())
            found.append(CutSeen(seen["rank"], seen["at"] - cut_at, seen["said"]))
            file.unlink()
    return found


def fault_rows(
    bench: LabBench, kind: str, cuts: dict[str, list[CutSeen]], records: Sequence[dict[str, Any]]
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
        rows += [bench.row(number, kind) for number in numbers]
    return rows


def noticed(records: Path, world_size: int) -> list[Path]:
    """Where each rank says what it made of a cut."""
    return [records.with_name(f"cut_{rank}.json") for rank in range(world_size)]


def question(records: Path) -> Path:
    """Where ranks ask for a state of the links; the file is gone when it is made."""
    return records.with_name("asked")
