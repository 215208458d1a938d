"""What happens when: one thing at a time, chosen at random among all that could happen now.

Streams are FIFO queues. Work at the head of one starts when it is ready and enough SMs are free, holds them until it
ends, and takes effect when it ends. Which stream goes on is drawn from a seed; streams are now and then very slow, so
that each can be far behind or far ahead of the others. When nothing can happen and somebody still waits, that is a
deadlock, and it is known at once: no clock is involved.

Hosts, the threads of the ranks, run one at a time as well (`hosts.py`), so a seed tells all.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["DeadlockError", "Event", "Stream", "Wait", "Work", "World", "after_all", "all_of"]

Wait = tuple[Callable[[], bool], str]
"""What work waits for, and in words."""


class DeadlockError(AssertionError):
    """Nothing can happen any more; the message says who waits for what, and who holds the SMs."""


@dataclass(eq=False)
class Work:
    """One entry of a stream.

    ready: when it may start. run: its effect, or a generator that yields what it waits for while it holds its SMs and
    is told whether that came. slow: starts before all else, and ends only when nothing else can happen.
    """

    what: str
    run: Callable[[], Generator[Wait, bool, None] | None]
    sms: int = 0
    ready: Wait | None = None
    slow: bool = False
    started: bool = field(default=False, init=False)
    running: Generator[Wait, bool, None] | None = field(default=None, init=False)
    awaited: Wait | None = field(default=None, init=False)


class Stream:
    """A FIFO queue. done: how many of its entries have ended."""

    def __init__(self, name: str) -> None:
        self.name, self.queue, self.put, self.done = name, deque[Work](), 0, 0
        self.weight = 1.0
        self._then: list[tuple[int, Callable[[], None]]] = []

    def append(self, work: Work) -> None:
        """Put work at the end."""
        self.queue.append(work)
        self.put += 1

    def pop(self) -> None:
        """The head has ended."""
        self.queue.popleft()
        self.done += 1
        due = [effect for place, effect in self._then if place <= self.done]
        if due:
            self._then = [(place, effect) for place, effect in self._then if place > self.done]
            for effect in due:
                effect()

    def then(self, place: int, effect: Callable[[], None]) -> None:
        """Call `effect` when so many entries have ended."""
        if self.done >= place:
            effect()
        else:
            self._then.append((place, effect))


@dataclass(frozen=True)
class Event:
    """A point in a stream."""

    stream: Stream
    place: int

    def query(self) -> bool:
        """Whether the stream has come past it."""
        return self.stream.done >= self.place


@dataclass(eq=False)
class _Device:
    name: str
    sms: int
    free: int
    streams: list[Stream]


class World:
    """All devices and hosts. patient: at a deadlock call those who watch for late work, as a clock would, and go on."""

    def __init__(self, seed: int, patient: bool = True) -> None:
        self.random, self.patient = random.Random(seed), patient
        self.devices: list[_Device] = []
        self.hosts: list[Any] = []
        self.watches: list[tuple[Event, Event, Callable[[], None]]] = []
        self.steps = 0

    def add_device(self, name: str, sms: int) -> _Device:
        """A device with so many SMs."""
        device = _Device(name, sms, sms, [])
        self.devices.append(device)
        return device

    def run(self, done: Callable[[], bool]) -> None:
        """Let things happen until `done`. Raises DeadlockError when nothing can and nobody watches."""
        while not done():
            if not self.step() and not self._time_out():
                raise DeadlockError(self.report())

    def step(self) -> bool:
        """One thing; False when nothing can happen."""
        self.steps += 1
        actions, slow = [], []
        for device in self.devices:
            for stream in device.streams:
                if stream.queue and (action := self._action(device, stream)):
                    (slow if action[2] else actions).append(action)
        actions += [(1.0, host.resume, False) for host in self.hosts if host.can_go_on()]
        chosen = actions or slow
        if not chosen:
            return False
        weights = [weight for weight, _, _ in chosen]
        self.random.choices(chosen, weights)[0][1]()
        return True

    def report(self) -> str:
        """Who waits for what."""
        lines = ["nothing can happen any more:"]
        for host in self.hosts:
            if host.awaited is not None:
                lines.append(f"  {host.name} waits for {host.awaited[1]}")
        for device in self.devices:
            for stream in device.streams:
                if stream.queue:
                    work = stream.queue[0]
                    wanted = work.awaited if work.started else work.ready if self._held(work) else None
                    held = f", holding {work.sms} of {device.sms} SMs," if work.started and work.sms else ""
                    why = f"waits for {wanted[1]}" if wanted else f"waits for {work.sms} free SMs of {device.free}"
                    lines.append(f"  {device.name}, {stream.name}: {work.what}{held} {why}")
        return "\n".join(lines)

    @staticmethod
    def _held(work: Work) -> bool:
        return work.ready is not None and not work.ready[0]()

    def _action(self, device: _Device, stream: Stream) -> tuple[float, Callable[[], None], bool] | None:
        work = stream.queue[0]
        if not work.started:
            if self._held(work) or work.sms > device.free:
                return None
            return (1e9 if work.slow else stream.weight), lambda: self._start(device, stream, work), False
        if work.awaited is not None and not work.awaited[0]():
            return None
        return stream.weight, lambda: self._go_on(device, stream, work, True), work.slow

    def _start(self, device: _Device, stream: Stream, work: Work) -> None:
        device.free -= work.sms
        work.started = True
        if self.random.random() < 0.2:  # from now on this stream is fast, or slow
            stream.weight = 10 ** self.random.uniform(-3, 0)
        if not work.sms:
            self._go_on(device, stream, work, True)

    def _go_on(self, device: _Device, stream: Stream, work: Work, came: bool) -> None:
        """Its effect, up to the next wait inside it."""
        work.awaited = None
        try:
            if work.running is not None:
                work.awaited = work.running.send(came)
                return
            work.running = work.run()
            if work.running is not None:
                work.awaited = next(work.running)
                return
        except StopIteration:
            pass
        device.free += work.sms
        stream.pop()

    def _time_out(self) -> bool:
        """As if time had passed: spinning kernels give up, watchdogs bark. Whether anybody did."""
        if not self.patient:
            return False
        for device in self.devices:
            for stream in device.streams:
                if stream.queue and stream.queue[0].awaited is not None:
                    self._go_on(device, stream, stream.queue[0], False)
                    return True
        late = [watch for watch in self.watches if watch[0].query() and not watch[1].query()]
        self.watches = [watch for watch in self.watches if watch not in late and not watch[1].query()]
        for _, _, bark in late:
            bark()
        return bool(late)


def after_all(events: Sequence[Event], effect: Callable[[], None]) -> None:
    """Call `effect` when all streams have come past these points."""
    if events:
        events[0].stream.then(events[0].place, lambda: after_all(events[1:], effect))
    else:
        effect()


def all_of(streams: Iterable[Stream]) -> Callable[[], bool]:
    """Whether streams have done what they hold now."""
    places = [(stream, stream.put) for stream in streams]
    return lambda: all(stream.done >= place for stream, place in places)
