"""Faults on links, while attention runs: a link at half its rate, at a tenth, and a node that is cut off in mid-step.

The ranks ask for the next state of the links and go on when the lab has made it; the cut comes while they compute.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flashcp.comm.errors import ExchangeError
from flashcp.experiments.folders import write_whole
from flashcp.experiments.lab.cases import LabBench
from flashcp.experiments.lab.nodes import Node
from flashcp.experiments.lab.rank import LabRank

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


def meet_faults(lab: LabRank, method: str, records: Path) -> None:
    """A rank's part: time a few calls in every state of the links, then compute until the cut is noticed.

    Raises RuntimeError where the cut goes unnoticed.
    """
    function = lab.function(lab.bench.work(lab.bench.batches[0])[method])
    function()
    for state in STATES:
        _ask(lab, records, state)
        ms = statistics.median(lab.timed(function) for _ in range(CALLS))
        lab.write(method=method, state=state, ms=ms)
    lab.ranks.barrier()
    if lab.ranks.rank == 0:
        write_whole(_question(records), CUT)
    deadline = time.monotonic() + 10 * lab.bench.timeout_s
    while time.monotonic() < deadline:
        try:
            function()
        except ExchangeError as error:
            seen = {"rank": lab.ranks.rank, "at": time.time(), "said": str(error)}
            write_whole(_noticed(records, lab.bench.world_size)[lab.ranks.rank], json.dumps(seen))
            return
    raise RuntimeError(f"{method}: a node was cut off and no error came in {10 * lab.bench.timeout_s:g} s")


def _ask(lab: LabRank, records: Path, state: str) -> None:
    """Wait until the lab has made the state."""
    if lab.ranks.rank == 0:
        question = _question(records)
        write_whole(question, state)  # or the lab may read an empty one, and answer it
        deadline = time.monotonic() + lab.bench.timeout_s
        while question.exists():
            if time.monotonic() > deadline:
                raise RuntimeError(f"the lab did not make the links {state} in {lab.bench.timeout_s:g} s")
            time.sleep(LOOK_S)
    lab.ranks.barrier()


class Answering:
    """The lab's part, called a few times a second: makes the states that ranks ask for. cut_at: time of the cut.

    The node is joined again when all ranks have noticed: torchrun's agents wait minutes for one that is gone.
    """

    def __init__(self, nodes: Sequence[Node], link_gbps: float, world_size: int, records: Path) -> None:
        self._node, self._link_gbps, self._question = nodes[-1], link_gbps, _question(records)
        self._noticed = _noticed(records, world_size)
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
    for file in _noticed(records, bench.world_size):
        if file.exists():
            seen: dict[str, Any] = json.loads(file.read_text())
            found.append(CutSeen(seen["rank"], seen["at"] - cut_at, seen["said"]))
            file.unlink()
    return found


def _noticed(records: Path, world_size: int) -> list[Path]:
    return [records.with_name(f"cut_{rank}.json") for rank in range(world_size)]


def _question(records: Path) -> Path:
    return records.with_name("asked")
