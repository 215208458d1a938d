"""One lab at a time, and an end that signals bring about and do not disturb."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = Path("/run/flashcp-lab.lock")
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class LabError(RuntimeError):
    """The lab cannot be built here; the message says in one line what is missing."""


@contextmanager
def lock() -> Iterator[None]:
    """Raises LabError where another lab runs on this machine."""
    try:
        opened = LOCK.open("a+")
    except OSError as error:
        raise LabError(f"the lab needs {LOCK}, which says that a lab runs: {error.strerror}") from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise LabError(f"another lab runs on this machine: process {file.read().strip()}") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the lab as Ctrl-C does, with everything removed, where nobody else took them."""
    ours = threading.current_thread() is threading.main_thread()
    taken = [number for number in ENDING if ours and signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Signals count for nothing meanwhile: a second Ctrl-C would leave half of a lab behind."""
    ours = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING if ours}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
