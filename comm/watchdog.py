"""Notices device work that does not end, from a thread of its own: no call of the host waits.

It looks at events (`waits.py` says why): one that was recorded before a wait, one behind it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

import torch

from flashcp.comm.ending import ends_before_python

_IDLE_S = 10.0  # a thread with nothing to watch ends
_LOOK_S = 0.1  # at most between two looks; a tenth of a short time-out


class Watchdog:
    """One thread, from the first watch on until nothing has been watched for a while.

    An event whose `query` raises counts as ended: the device has failed, every later call on it says so, and says it
    better than a time-out. What `late` raises is printed like the error of any thread; the others stay watched.

    Events may only be recorded outside of a CUDA graph's capture. A capture beside this thread is not disturbed by its
    queries (`_context_of_this_thread`).
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._watched: list[Callable[[], Callable[[], None] | None]] = []
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None
        ends_before_python(self)

    def watch(self, started: torch.cuda.Event | None, ended: torch.cuda.Event, late: Callable[[], None]) -> None:
        """`late` is called once, from the watchdog's thread, if `ended` has not come within timeout_s of `started`
        (None: of this call).

        Time counts from when `started` is seen done: a stream may be far behind the host. Events and `late` are
        dropped when the work has ended or is late.
        """
        deadline = time.monotonic() + self.timeout_s if started is None else None

        def look() -> Callable[[], None] | None:
            """What is left to do about it when it is over: ended, late, or on a device that failed; None before."""
            nonlocal deadline
            now = time.monotonic()  # before the query: a thread that was held up blames nobody for it
            try:
                if ended.query():
                    return lambda: None
                if deadline is None and (started is None or started.query()):
                    deadline = now + self.timeout_s
            except Exception:
                return lambda: None
            return late if deadline is not None and now > deadline else None

        with self._news:
            self._watched.append(look)
            if self._thread is None:
                arguments = (_context_of_this_thread(),)
                self._thread = threading.Thread(target=self._run, args=arguments, name="flashcp-watchdog", daemon=True)
                self._thread.start()
            elif len(self._watched) == 1:
                self._news.notify()

    def close(self) -> None:
        """Forget all that is watched; the thread ends. A later watch starts another."""
        with self._news:
            self._watched.clear()
            thread, self._thread = self._thread, None
            self._news.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(self.timeout_s)

    def _run(self, enter: Callable[[], None]) -> None:
        enter()
        while self._rest():
            self._look()

    def _rest(self) -> bool:
        """Sleep until it is time for a look; False when this thread is to end."""
        me = threading.current_thread()
        with self._news:
            if self._watched:
                self._news.wait_for(lambda: self._thread is not me, min(_LOOK_S, self.timeout_s / 10))
            elif not self._news.wait_for(lambda: self._watched or self._thread is not me, _IDLE_S):
                self._thread = None
            return self._thread is me

    def _look(self) -> None:
        with self._news:
            watched = list(self._watched)
        over = {look: left for look in watched if (left := look()) is not None}
        with self._news:
            if self._thread is not threading.current_thread():
                return  # closed meanwhile
            self._watched = [look for look in self._watched if look not in over]
        for act in over.values():
            try:
                act()
            except Exception:
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))


def _context_of_this_thread() -> Callable[[], None]:
    """For another thread to call first: what it asks of CUDA is asked of the same GPU, and disturbs no capture.

    A thread without a context makes one on GPU 0, whichever GPU its rank has. A capture in mode `global`, torch's
    default, forbids event queries in all threads but those that opted out.
    """

    def enter() -> None:
        driver.cuCtxSetCurrent(context)
        driver.cuThreadExchangeStreamCaptureMode(driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)

    try:
        from cuda.bindings import driver

        _, context = driver.cuCtxGetCurrent()
    except (ImportError, RuntimeError):  # no such package, or no driver: nothing of CUDA is watched
        return lambda: None
    return enter
