"""No hostile value hangs, takes memory without bound or raises what is not documented; the battery would see it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile import child, command_line
from tests.hostile.battery import run
from tests.hostile.child import COMMAND_LINE, GROUPS, LINES, outcome
from tests.hostile.command_line import refused
from tests.hostile.doors import DOORS, Door

SOME = {"simulating": 3, "training": 2, COMMAND_LINE: 29}
"""Of groups that take long every so-manieth call; `python -m tests.hostile.battery` makes all."""


@pytest.mark.parametrize("group", GROUPS)
def test_hostile_values_end_as_documented(group: str) -> None:
    battery = run(group, SOME.get(group, 1))
    assert battery.wrong == {}
    assert battery.calls > (30 if group in LINES else 1000)


def _raises(value: object) -> None:
    raise ValueError("x" * 999 if value is None else f"{value}: expected one of {'names, ' * 99}")


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        (lambda value: len(value), "TypeError: object of type 'NoneType' has no len()"),
        (_raises, "ValueError of 1 lines and 999 characters"),
        (lambda value: value, ""),
    ],
)
def test_what_is_not_documented_is_seen(call: Callable[[object], object], wrong: str) -> None:
    found = outcome(Door("door", call, {"value": 1}), "value", lambda: None)
    assert found.startswith(wrong)
    assert bool(found) == bool(wrong)


def test_a_list_of_names_may_be_long() -> None:
    assert outcome(Door("door", _raises, {"value": 1}), "value", lambda: 1) == ""


def test_a_call_without_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(value: object) -> None:
        while True:
            pass

    monkeypatch.setitem(DOORS, "bad", lambda: iter([Door("bad", endless, {"value": 1})]))
    call = next(child.calls("bad"))
    assert call.name == "bad(value=None)"
    assert child.timed(call, seconds=0.1) == "took more than 0.1 s"


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (["plan", "world_size=0"], ""),
        (["plan", "windows=1", "context=64", "world_size=1"], ""),
        (["plan", "--help"], ""),
        (["report"], ""),
    ],
)
def test_how_a_command_line_must_end(line: list[str], wrong: str) -> None:
    assert refused(line).startswith(wrong)
    assert bool(refused(line)) == bool(wrong)


def test_files_that_a_refused_command_leaves_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaves(_: list[str]) -> int:
        Path("left").write_text("")
        print("flashcp: error: no", file=sys.stderr)
        return 2

    monkeypatch.setattr(command_line, "main", leaves)
    assert refused(["plan"]).startswith("left behind: ")
