"""A moment of fuzzing for every parser, what fuzzing found before, and that a failure would be seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flashcp.experiments.sweep.results import read_rows
from tests.fuzz import __main__ as command
from tests.fuzz.child import fuzz
from tests.fuzz.parsers import Parser, call, parsers

PARSERS = {parser.name: parser for parser in parsers()}
A_MOMENT_S = 0.2
HEADER = PARSERS["results.csv"].seeds[0].splitlines(keepends=True)[0]


@pytest.mark.parametrize("name", PARSERS)
def test_good_input_is_read_and_spoiled_input_refused_in_one_line(name: str, tmp_path: Path) -> None:
    for seed in PARSERS[name].seeds:
        call(PARSERS[name], seed, tmp_path)
    found = fuzz(PARSERS[name], A_MOMENT_S, None)
    assert (found["failure"], found["input"]) == ("", "")
    assert found["inputs"] > 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("configuration of a run", b'{"out": "x", "\xc2\x85context": 64}'),
        ("latest.json", b'{"checkpoint": "\xc2\x85checkpoints/step_1", "lineage": "01234567"}'),
        ("latest.json", b'{"checkpoint": "' + b"[" * 5_000 + b'", "lineage": "01234567"}'),
        ("metrics.jsonl", b"[" * 100_000 + b"\n"),
        ("metrics.jsonl", b'{"step": 1e9992, "loss": 1.5}\n'),
        ("step.json", b'{"world_size": 1e9992, "found": "nan"}'),
        ("results.csv", HEADER + b"case,method,metric,ms,," + b"[" * 5_000 + b",1,1,,,,,,,\n"),
        ("JSON lines", b'{"\xe2\x80\xa8text": "a"}\n'),
        ("JSON lines", b'{"' + b"9" * 5_000 + b'": 1}\n'),
        ("tokenizer", b'{"version": "' + b"9" * 5_000 + b'"}'),
        ("overrides", b"a" + b"[" * 5_000),
        ("overrides", b"data=\n{source:pile,sigma:1.5}"),
        ("overrides", b"model=\n\n"),
    ],
)
def test_what_fuzzing_found_stays_mended(name: str, content: bytes, tmp_path: Path) -> None:
    call(PARSERS[name], content, tmp_path)


def test_a_moment_too_short_for_anything_else_parses_one_input() -> None:
    assert fuzz(Parser("slow", [b"a"], lambda content: None), 1e-9, None)["inputs"] >= 1


def test_what_is_not_documented_is_a_failure_with_its_smallest_input() -> None:
    def parse(content: bytes) -> None:
        if b"!!" in content:
            raise KeyError("x")

    found = fuzz(Parser("bad", [b"a"], parse), 20, None)
    assert found["failure"].startswith("KeyError: 'x'")
    assert "!!" in found["input"]


def test_a_message_of_two_lines_is_a_failure() -> None:
    def parse(content: bytes) -> None:
        raise ValueError("one\ntwo")

    assert "a message of several lines" in fuzz(Parser("bad", [b"a"], parse), 20, None)["failure"]


def test_an_input_without_end_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(content: bytes) -> None:
        while content == b"a":
            pass

    monkeypatch.setattr("tests.fuzz.child.A_CALL_S", 0.1)
    assert fuzz(Parser("bad", [b"a"], parse), 20, None)["failure"].endswith("TooLong: more than 0.1 s")


def test_the_table_and_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_child(name: str, seconds: float, database: str) -> dict[str, object]:
        failure = "KeyError: 1" if name == "plan" else ""
        return {"parser": name, "inputs": 1000, "lines": 5, "mib": 3, "failure": failure, "input": "b'x'"}

    monkeypatch.setattr(command, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(command, "fuzz_in_child", in_child)
    assert command.main(1, "lengths") == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["lengths", "1,000", "5", "0", "3"]
    assert command.main(1, "command line") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["configuration", "overrides"]
    assert command.main(1, "plan") == 1
    assert capsys.readouterr().out.endswith("plan: KeyError: 1\n  b'x'\n")
    assert command.main(0) == command.main(1, "nope") == 2


def test_rows_of_some_parsers_stay_beside_those_of_others(tmp_path: Path) -> None:
    def found(name: str, inputs: int) -> dict[str, object]:
        return {"parser": name, "inputs": inputs, "lines": 5, "mib": 3, "failure": "", "input": ""}

    command.write([found("plan", 10), found("lengths", 20)], 1, tmp_path)
    command.write([found("plan", 30)], 2, tmp_path)
    rows = {(row.provider, row.metric): (row.case, row.median) for row in read_rows(tmp_path)}
    assert rows["plan", "inputs"] == ("2 s a parser", 30)
    assert rows["lengths", "inputs"] == ("1 s a parser", 20)
    assert len(rows) == 8


def test_a_child_says_what_it_did(tmp_path: Path) -> None:
    found = command.fuzz_in_child("block shapes", 0.5, str(tmp_path))
    assert found["failure"] == ""
    assert found["inputs"] > 0
    assert json.loads(json.dumps(found)) == found
