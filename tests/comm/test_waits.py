"""Waits that streams do: on events that are plain objects, without a GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch

from flashcp.comm.errors import ExchangeError, ExchangeTimeoutError
from flashcp.comm.waits import HostWaits, StreamWaits

TIMEOUT_S = 0.2


class Event:
    """As a device's event: not done until it is set."""

    def __init__(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done


class Work:
    """As torch.distributed's."""

    def __init__(self) -> None:
        self.waits: list[tuple[object, ...]] = []

    def wait(self, *arguments: object) -> None:
        self.waits.append(arguments)


@pytest.fixture
def marks() -> Iterator[list[Event]]:
    """The events that are recorded, in order."""
    events: list[Event] = []

    def mark(waits: StreamWaits, home: object) -> Event:
        events.append(Event())
        return events[-1]

    with patch.object(StreamWaits, "_mark", mark):
        yield events


def test_a_stream_is_told_to_wait_and_the_host_goes_on(marks: list[Event]) -> None:
    waits, works = StreamWaits(3, TIMEOUT_S), [Work(), Work()]
    waits.wait(works, "gradients", None)
    assert [work.waits for work in works] == [[()], [()]]
    assert len(marks) == 2
    for event in marks:
        event.done = True
    time.sleep(2 * TIMEOUT_S)
    waits.synchronize()  # nothing was late


def test_the_host_passes_its_time_out_on() -> None:
    work = Work()
    HostWaits(0, 2.5).wait([work], "rows", None)
    ((limit,),) = work.waits
    assert limit.total_seconds() == 2.5  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["wait", "check", "synchronize"])
def test_late_rows_raise_at_the_next_call_and_say_who_waited_for_what(marks: list[Event], how: str) -> None:
    waits = StreamWaits(3, TIMEOUT_S)
    waits.wait([Work()], "gradients of another rank", None)
    marks[0].done = True
    if how != "synchronize":
        deadline = time.monotonic() + 5
        while waits._error is None and time.monotonic() < deadline:
            time.sleep(0.01)
    work = Work()
    call = {"wait": lambda: waits.wait([work], "rows", None), "check": waits.check, "synchronize": waits.synchronize}[
        how
    ]
    for _ in range(2):  # and at every later call
        with pytest.raises(ExchangeTimeoutError, match=r"^rank 3 waited 0\.2 s for gradients of another rank, on its"):
            call()
    assert work.waits == [()] * (2 if how == "wait" else 0), "an error leaves no work without its wait"


def test_a_stream_that_has_not_come_to_the_wait_is_not_late(marks: list[Event]) -> None:
    waits = StreamWaits(0, TIMEOUT_S)
    waits.wait([Work()], "rows", None)
    time.sleep(3 * TIMEOUT_S)
    waits.check()


def test_synchronize_returns_when_all_has_come(marks: list[Event]) -> None:
    waits = StreamWaits(0, 5.0)
    for _ in range(3):
        waits.wait([Work()], "rows", None)
    done: list[float] = []
    thread = threading.Thread(target=lambda: (waits.synchronize(), done.append(time.monotonic())))
    thread.start()
    for event in (marks[5], marks[1]):  # not in order: streams run beside each other
        event.done = True
    time.sleep(0.1)
    assert not done
    marks[3].done = True
    thread.join(5)
    assert done
    assert not waits._awaited, "what has come is forgotten"


def test_what_has_come_is_forgotten_on_the_way(marks: list[Event]) -> None:
    waits = StreamWaits(0, 5.0)
    for _ in range(100):
        waits.wait([Work()], "rows", None)
        for event in marks:
            event.done = True
    assert len(waits._awaited) == 1


def test_without_a_stream_nothing_is_marked() -> None:
    waits = StreamWaits(0, TIMEOUT_S)
    assert waits.home(torch.device("cpu")) is None
    waits.wait([Work()], "rows", None)
    assert not waits._awaited
    waits.synchronize()


def test_the_first_error_that_was_noted_stays() -> None:
    waits = HostWaits(0, 1.0)
    waits.note(ExchangeError("first"))
    waits.note(ExchangeError("second"))
    with pytest.raises(ExchangeError, match="first"):
        waits.synchronize()
