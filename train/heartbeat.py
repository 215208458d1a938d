"""Ranks that watch each other and their launcher: who falls silent is named, and nobody works on alone.

An exchange names a rank that does not come, after parallel.timeout_s. Elsewhere (sums of gradients, checkpoints, the
start) torch alone waits, for loop.timeout_s and without a name. And a launcher that was killed stops no rank.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from flashcp.comm.ending import ends_before_python

BEAT_S = 0.5
LEAST_S = 5.0
"""Nobody is called silent before: a busy machine may not let a thread run for a second or two."""
STOPPED_S = 3.0
"""Who does not beat for so long while another rank fails is not waited for."""
STORE_S = 5.0
DONE = "done"


def start_number() -> int:
    """How often the launcher has started these ranks before: its store, and what lies in it, outlives them."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


class Beat(NamedTuple):
    """What a rank says of itself. number: of its beats, DONE at its end. doing: where it is, such as `in step 3`."""

    number: str
    process: str
    host: str
    doing: str

    def __str__(self) -> str:
        return "\n".join(self)


class Heartbeat:
    """A thread that says that this rank lives and looks whether the others do. Every rank of a launch makes one.

    One that has been silent for `silent_s` is named in a line on every other rank, killed where it is on their host (a
    stopped process hears of nothing milder), and they end with exit code 1. So does a rank whose launcher is gone.
    What counts are a rank's own beats: a job that is stopped as a whole, and goes on, is silent to nobody.
    """

    def __init__(self, rank: int, world_size: int, silent_s: float) -> None:
        self.doing = "at the start"
        self._rank, self._launcher = rank, os.getppid()
        self._patience = round(max(silent_s, LEAST_S) / BEAT_S)
        self._host = socket.gethostname()
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=STORE_S))
        self._keys = [f"flashcp/alive/{start_number()}/{other}" for other in range(world_size)]
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="flashcp-heartbeat", daemon=True)
        self._thread.start()
        ends_before_python(self)

    def kill_the_stopped(self) -> None:
        """Call it where this rank fails. A stopped rank hears nothing of it, and its launcher would wait half a minute.

        Who is on this host and has not said a word for STOPPED_S is killed.
        """
        with suppress(RuntimeError):  # the store is gone: so is the launcher
            before = self._others()
            given_up = time.monotonic() + STOPPED_S
            while before and time.monotonic() < given_up:
                time.sleep(BEAT_S / 5)
                now = self._others()
                before = {other: beat for other, beat in before.items() if now.get(other) == beat}
            for beat in before.values():
                self._kill(beat)

    def close(self) -> None:
        """Say that this rank is done, and end the thread."""
        if not self._ending.is_set():
            self._ending.set()
            self._thread.join()

    def _watch(self) -> None:
        beats, there = 0, True
        last: dict[int, tuple[Beat, int]] = {}
        while not self._ending.wait(BEAT_S):
            if os.getppid() != self._launcher:
                self._end("its launcher is gone")
            beats += 1
            if there:
                try:
                    self._store.set(self._keys[self._rank], str(self._beat(str(beats))))
                    self._look(last)
                except RuntimeError:  # the store is gone, with the launcher that had it: what is next ends this rank
                    there = False
        with suppress(RuntimeError):
            self._store.set(self._keys[self._rank], str(self._beat(DONE)))

    def _beat(self, number: str) -> Beat:
        return Beat(number, str(os.getpid()), self._host, self.doing)

    def _read(self, other: int) -> Beat:
        return Beat(*self._store.get(self._keys[other]).decode().split("\n"))

    def _others(self) -> dict[int, Beat]:
        """The last beat of each other rank that has one and is not done."""
        others = [other for other in range(len(self._keys)) if other != self._rank]
        beats = {other: self._read(other) for other in others if self._store.check([self._keys[other]])}
        return {other: beat for other, beat in beats.items() if beat.number != DONE}

    def _kill(self, beat: Beat) -> None:
        if beat.host == self._host:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(int(beat.process), signal.SIGKILL)

    def _look(self, last: dict[int, tuple[Beat, int]]) -> None:
        """last: of each other rank that was heard its last beat, and how many of this rank's own ago that was new."""
        for other, beat in self._others().items():
            before, silent = last.get(other, (None, 0))
            last[other] = beat, silent + 1 if beat == before else 0
            if last[other][1] >= self._patience:
                self._kill(beat)
                silence = f"silent for {self._patience * BEAT_S:g} s, last heard of {beat.doing}"
                self._end(f"rank {other} has been {silence}: it was stopped, or its host {beat.host} is gone")

    def _end(self, why: str) -> None:
        print(f"error: rank {self._rank} of {len(self._keys)}: {why}", file=sys.stderr, flush=True)
        os._exit(1)  # the other threads wait inside of torch, for ranks that will not come
