"""What the lab makes of the questions that ranks ask about links."""

from __future__ import annotations

from pathlib import Path

from flashcp.experiments.lab.faults import CUT, Answering
from flashcp.experiments.lab.machine import Quotas
from flashcp.experiments.lab.nodes import Link, Node


def test_questions_of_a_run_that_was_killed_are_not_answered(tmp_path: Path) -> None:
    asked, noticed = tmp_path / "asked", tmp_path / "cut_1.json"
    asked.write_text(CUT)
    noticed.write_text("{}")
    answering = Answering([Node(0, Link(1.0), Quotas(tmp_path, 1.0))], 1.0, 2, tmp_path / "records.jsonl")
    assert not asked.exists()
    assert not noticed.exists()
    answering()  # without a question it cuts nothing
    assert not answering.cut_at
