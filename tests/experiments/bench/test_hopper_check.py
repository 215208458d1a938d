"""The check of the Hopper candidate: what one case does to the others, and to the time. Its processes are played."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="this triton has no Gluon")

from flashcp.experiments.bench import hopper_check
from flashcp.experiments.bench.attention_cases import Case, all_cases

CASES = ["one_a", "one_b", "pile", "rank_of_8", "last"]
CHILD = """
import os, sys, time
cases, does, first = sys.argv[1].split(), dict(part.split("=") for part in sys.argv[2].split()), int(sys.argv[3])
if does.get("start") == "hangs": time.sleep(60)
for number, label in list(enumerate(cases))[first:]:
    print("begin", number, label, flush=True)
    what = does.get(label, "passes")
    if what == "hangs": time.sleep(60)
    if what == "dies": os.kill(os.getpid(), 9)
    if what == "exits": sys.exit(3)
    if what == "fails": print("failed differs by 3.0e-01", flush=True); sys.exit(1)
    print("passed", label, flush=True)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hopper_check, "CASE_S", 1.5)
    monkeypatch.setattr(hopper_check, "START_S", 10.0)
    hopper_check.passed.cache_clear()
    yield
    hopper_check.passed.cache_clear()


def run(monkeypatch: pytest.MonkeyPatch, does: str, limit_s: float = 30.0) -> frozenset[str]:
    def command(first: int) -> list[str]:
        return [sys.executable, "-c", CHILD, " ".join(CASES), does, str(first)]

    monkeypatch.setattr(hopper_check, "_command", command)
    return hopper_check.passed(limit_s)


def test_all_come_through_and_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "") == set(CASES)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("does", "why"),
    [
        ("hangs", "no answer within 1.5 s"),
        ("fails", "differs by 3.0e-01"),
        ("dies", "its process ended by signal 9"),
        ("exits", "its process ended with code 3"),
    ],
)
def test_a_bad_case_costs_itself_alone(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], does: str, why: str
) -> None:
    assert run(monkeypatch, f"pile={does}") == set(CASES) - {"pile"}
    assert capfd.readouterr().err == f"gluon left out of pile: {why}\n"


def test_the_first_and_the_last_may_be_bad(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "one_a=fails last=dies") == set(CASES) - {"one_a", "last"}
    assert [line.split(":")[0] for line in capfd.readouterr().err.splitlines()] == [
        "gluon left out of one_a",
        "gluon left out of last",
    ]


def test_three_bad_ones_behind_each_other_end_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "one_b=fails pile=fails rank_of_8=fails") == {"one_a"}
    assert capfd.readouterr().err.endswith("gluon left out of all cases behind rank_of_8\n")


def test_the_time_is_bounded_and_what_came_through_stays(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hopper_check, "CASE_S", 30.0)
    began = time.monotonic()
    assert run(monkeypatch, "pile=hangs", limit_s=2.0) == {"one_a", "one_b"}
    assert time.monotonic() - began < 10
    assert capfd.readouterr().err.endswith("gluon left out of all cases behind pile\n")


def test_a_process_that_never_begins_ends_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "start=hangs", limit_s=1.0) == frozenset()
    assert re.fullmatch(r"gluon left out: no answer within (1|0\.\d+) s\n", capfd.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_device_the_real_process_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hopper_check, "START_S", 60.0)
    assert hopper_check.passed(60.0) == frozenset()
    assert capfd.readouterr().err == "gluon left out: there is no CUDA device\n"


def test_a_process_says_what_it_does_from_a_case_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = [case.label for case in all_cases()]

    def check(case: Case) -> None:
        if case.label == labels[4]:
            raise RuntimeError("differs\nby much")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hopper_check, "check", check)
    assert hopper_check.main(["3"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"begin 3 {labels[3]}",
        f"passed {labels[3]}",
        f"begin 4 {labels[4]}",
        "failed differs",
    ]
    assert hopper_check.main(["5"]) == 0
    assert capsys.readouterr().out.split()[-2:] == ["passed", labels[-1]]
