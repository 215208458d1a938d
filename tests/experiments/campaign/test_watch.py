"""Cases that raise, hang or die cost their own rows, within their limits, and what they started ends with them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from flashcp.experiments.campaign import watch
from flashcp.experiments.campaign.watch import PartResult, run_part
from flashcp.experiments.sweep.results import Row, commit, read_rows

TROUBLE = "tests.experiments.campaign.trouble:PART"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[PartResult, Path]:
    folder = tmp_path_factory.mktemp("trouble")
    return run_part(TROUBLE, folder, 100), folder


def rows_of(result: tuple[PartResult, Path], case: str) -> list[tuple[str, str]]:
    """Provider, and the metric or why it failed."""
    rows = [row for row in result[0].rows if row.case == case]
    return [(row.provider, row.kind if row.metric == "failed" else row.metric) for row in rows]


def test_every_row_is_written_with_what_a_number_must_carry(result: tuple[PartResult, Path]) -> None:
    found, folder = result
    assert read_rows(folder) == found.rows
    row: Row
    for row in found.rows:
        assert row.device == "cpu"
        assert "torch" in row.versions
        assert "triton" in row.versions
        assert row.commit == commit()
        assert len(row.date) == 10
        assert row.kind == "made up" or row.kind.startswith("failed: ")


def test_a_case_that_raises_costs_a_row(result: tuple[PartResult, Path]) -> None:
    assert rows_of(result, "good") == [("before", "time_ms")]
    assert rows_of(result, "raises") == [("before", "time_ms"), ("", "failed: no such kernel")]
    assert rows_of(result, "last") == [("before", "time_ms")]


def test_a_case_that_hangs_is_ended_with_all_it_started(result: tuple[PartResult, Path]) -> None:
    assert rows_of(result, "hangs") == [("before", "time_ms"), ("", "failed: no end within 3 s")]
    child = int((result[1] / "child").read_text())
    for _ in range(50):
        if not running(child):
            break
        time.sleep(0.1)
    assert not running(child)


def running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_a_process_that_dies_costs_a_case(result: tuple[PartResult, Path]) -> None:
    assert rows_of(result, "dies") == [("before", "time_ms"), ("", "failed: its process ended with code -11")]


def test_a_device_that_is_lost_costs_the_provider_that_lost_it(result: tuple[PartResult, Path]) -> None:
    assert rows_of(result, "lost") == [("a", "failed: illegal address"), ("before", "time_ms")]


def test_a_provider_that_hangs_or_dies_costs_its_own_rows(result: tuple[PartResult, Path]) -> None:
    numbers = [("before", "time_ms"), *((name, "time_ms") for name in "acd")]
    assert rows_of(result, "one_hangs") == [("b", "failed: no end within 3 s"), *numbers, ("d", "failed: too slow")]
    died = "failed: its process ended with code 3"
    numbers = [("before", "time_ms"), *((name, "time_ms") for name in "bd")]
    assert rows_of(result, "two_die") == [("a", died), ("c", died), *numbers, ("d", "failed: too slow")]


def test_how_a_part_closes(result: tuple[PartResult, Path]) -> None:
    found = result[0]
    assert found.failures == sum(row.metric == "failed" for row in found.rows) == 9
    assert found.line("trouble") == f"trouble: {len(found.rows)} rows, 9 failures, {found.seconds:.0f} s"


def test_a_parts_time_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    found = run_part(TROUBLE, tmp_path, 0.05)
    assert found.rows == []
    assert found.left_out == 8
    assert time.monotonic() - began < 2
    assert "last: left out, the time is over" in capsys.readouterr().err
    assert "8 cases left out for want of time" in found.line("trouble")
    late = run_part(TROUBLE, tmp_path, 12, cases="two_die")  # its process alone takes seconds to start
    assert late.seconds < 20


def test_a_hanging_case_is_ended_when_the_parts_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.experiments.campaign import trouble

    monkeypatch.setattr(trouble, "cases", lambda small: [trouble.Case("hangs", 0.1, 500.0)])
    found = run_part(TROUBLE, tmp_path, 15)
    assert found.seconds < 18
    assert [row.kind for row in found.rows][-1] == "failed: the part's time was over"


def test_a_machine_that_takes_every_process_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "START_S", 0.01)
    found = run_part(TROUBLE, tmp_path, 60)
    assert found.failures == len(found.rows) == watch.LOST_IN_A_ROW
    assert {row.kind for row in found.rows} == {"failed: no process to measure in: TimeoutError"}
    assert found.left_out == 8 - watch.LOST_IN_A_ROW
    assert "last: left out, the processes before it died" in capsys.readouterr().err
