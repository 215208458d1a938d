"""The watchdog, on events that are plain objects: whom it calls, when, what it keeps, what it survives."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest

from flashcp.comm import watchdog as module
from flashcp.comm.watchdog import Watchdog

TIMEOUT_S = 0.2
SOON_S = 5.0  # a busy machine


class Event:
    """As a device's event: not done until it is set; fails when told to."""

    def __init__(self, done: bool = False) -> None:
        self.done, self.fails, self.queries = done, False, 0

    def query(self) -> bool:
        self.queries += 1
        if self.fails:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return self.done


@pytest.fixture(autouse=True)
def _threads_of_this_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of this process leave watchdogs that idle for a while: they are not counted."""
    monkeypatch.setitem(globals(), "_BEFORE", frozenset(threads()))


_BEFORE: frozenset[threading.Thread] = frozenset()


@pytest.fixture
def dog() -> Iterator[Watchdog]:
    dog = Watchdog(TIMEOUT_S)
    yield dog
    dog.close()


def within(seconds: float, holds: Callable[[], object]) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def threads() -> list[threading.Thread]:
    found = (thread for thread in threading.enumerate() if thread.name == "flashcp-watchdog")
    return [thread for thread in found if thread not in _BEFORE]


def test_work_that_does_not_end_is_late_once_and_not_before_its_time(dog: Watchdog) -> None:
    late = []
    began = time.monotonic()
    dog.watch(None, Event(), lambda: late.append((time.monotonic() - began, threading.current_thread().name)))
    assert time.monotonic() - began < TIMEOUT_S / 2  # the caller waits for nothing
    assert within(SOON_S, lambda: late)
    time.sleep(2 * TIMEOUT_S)
    assert len(late) == 1
    seconds, thread = late[0]
    assert seconds >= TIMEOUT_S
    assert thread == "flashcp-watchdog"


def test_work_that_ends_is_never_late(dog: Watchdog) -> None:
    late: list[str] = []
    first, second = Event(), Event()
    dog.watch(None, first, lambda: late.append("first"))
    dog.watch(Event(done=True), second, lambda: late.append("second"))
    first.done = second.done = True
    time.sleep(2 * TIMEOUT_S)
    assert late == []
    seen = first.queries
    time.sleep(TIMEOUT_S)
    assert first.queries == seen, "work that has ended is looked at no more"


def test_time_counts_from_the_start_of_the_work(dog: Watchdog) -> None:
    late: list[float] = []
    started = Event()
    dog.watch(started, Event(), lambda: late.append(time.monotonic()))
    time.sleep(3 * TIMEOUT_S)  # a stream that is far behind the host
    assert late == []
    started.done, now = True, time.monotonic()
    assert within(SOON_S, lambda: late)
    assert late[0] - now >= TIMEOUT_S


def test_each_piece_of_work_has_its_own_time(dog: Watchdog) -> None:
    late: list[int] = []
    events = [Event() for _ in range(6)]
    for i, event in enumerate(events):
        dog.watch(None, event, lambda i=i: late.append(i))  # type: ignore[misc]
    for event in events[::2]:
        event.done = True
    assert within(SOON_S, lambda: len(late) == 3)
    assert sorted(late) == [1, 3, 5]
    assert len(threads()) == 1


def test_a_thread_that_was_held_up_blames_nobody(dog: Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work ended in time; the watchdog, stopped in the meantime, sees both ends at once."""
    late: list[str] = []
    monkeypatch.setattr(module, "_LOOK_S", 10 * TIMEOUT_S)
    dog.timeout_s = 3 * TIMEOUT_S
    ended = Event()
    dog.watch(None, ended, lambda: late.append("late"))
    look = Watchdog._look

    def held_up(self: Watchdog) -> None:
        time.sleep(4 * TIMEOUT_S)
        ended.done = True
        look(self)

    monkeypatch.setattr(Watchdog, "_look", held_up)
    assert within(SOON_S, lambda: ended.done)
    time.sleep(TIMEOUT_S)
    assert late == []


def test_a_device_that_failed_is_not_called_late_and_the_others_stay_watched(dog: Watchdog) -> None:
    late: list[str] = []
    broken, started = Event(), Event()
    dog.watch(None, broken, lambda: late.append("broken"))
    dog.watch(started, Event(), lambda: late.append("behind a broken start"))
    dog.watch(None, Event(), lambda: late.append("other"))
    broken.fails = started.fails = True
    assert within(SOON_S, lambda: late)
    time.sleep(2 * TIMEOUT_S)
    assert late == ["other"]


def test_an_error_in_late_is_printed_and_the_thread_goes_on(dog: Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: printed.append(str(arguments.exc_value)))
    late: list[str] = []

    def fails() -> None:
        raise RuntimeError("nobody to tell")

    dog.watch(None, Event(), fails)
    assert within(SOON_S, lambda: printed)
    assert printed == ["nobody to tell"]
    dog.watch(None, Event(), lambda: late.append("later"))
    assert within(SOON_S, lambda: late)


@pytest.mark.parametrize("ends", [True, False], ids=["ended", "late"])
def test_what_was_watched_is_let_go(dog: Watchdog, ends: bool) -> None:
    class Rows:
        """Stands for a tensor that a callback or an event holds."""

    rows, event = Rows(), Event()
    held = weakref.ref(rows), weakref.ref(event)
    gc.disable()  # without the help of the collector: no cycles
    try:
        dog.watch(None, event, lambda rows=rows: None)  # type: ignore[misc]
        event.done = ends
        del rows, event
        assert within(SOON_S, lambda: not any(reference() for reference in held))
    finally:
        gc.enable()


def test_the_thread_ends_when_idle_and_another_one_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert within(SOON_S, lambda: not threads())
    monkeypatch.setattr(module, "_IDLE_S", 0.05)
    dog, late = Watchdog(TIMEOUT_S), []
    assert threads() == []
    dog.watch(None, Event(done=True), lambda: late.append("never"))
    assert [thread.daemon for thread in threads()] == [True]
    assert within(SOON_S, lambda: not threads())
    dog.watch(None, Event(), lambda: late.append("second thread"))
    assert within(SOON_S, lambda: late == ["second thread"])
    assert within(SOON_S, lambda: not threads())


def test_closed_it_forgets_and_can_watch_again() -> None:
    dog, late = Watchdog(TIMEOUT_S), []
    dog.watch(None, Event(), lambda: late.append("forgotten"))
    dog.close()
    assert within(SOON_S, lambda: not threads())
    dog.watch(None, Event(), lambda: late.append("watched"))
    assert within(SOON_S, lambda: late)
    time.sleep(TIMEOUT_S)
    assert late == ["watched"]
    dog.close()
