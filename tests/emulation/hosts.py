"""Hosts of ranks as threads of which one runs at a time, and the ranks' messages between them."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from flashcp.comm.mail import Mail
from tests.emulation.world import Wait, World

__all__ = ["EmulatedMail", "Host", "run_hosts"]


class Host:
    """One rank's program. It runs until it waits for something, or gives way at random; then the world goes on."""

    def __init__(self, world: World, name: str, program: Callable[[], Any]) -> None:
        self.world, self.name = world, name
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended = False
        self.awaited: Wait | None = None
        self._program = program
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._stopping = False
        self.gives_way = 0.15  # how often
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def can_go_on(self) -> bool:
        """Whether what it waits for is there."""
        return not self.ended and (self.awaited is None or self.awaited[0]())

    def resume(self) -> None:
        """Let it run until it waits again; called by the world."""
        self.awaited = None
        self._turn.release()
        self._back.acquire()

    def wait(self, there: Callable[[], bool], what: str) -> None:
        """Called by its program."""
        self.awaited = (there, what)
        self._back.release()
        self._turn.acquire()
        if self._stopping:
            raise SystemExit

    def give_way(self) -> None:
        """Now and then, let others go first."""
        if self.world.random.random() < self.gives_way:
            self.wait(lambda: True, "its turn")

    def stop(self) -> None:
        """End its thread, wherever it is."""
        if not self.ended:
            self._stopping = True
            self._turn.release()
            self._back.acquire()
        self._thread.join()

    def _run(self) -> None:
        self._turn.acquire()
        try:
            if not self._stopping:
                self.result = self._program()
        except BaseException as error:
            self.error = error
        self.ended = True
        self._back.release()


def run_hosts(world: World, programs: Sequence[Callable[[Host], Any]]) -> list[Any]:
    """One host a program, until all have ended -> their results. Raises what one of them raised, or DeadlockError."""
    hosts: list[Host] = []
    for rank, program in enumerate(programs):
        hosts.append(Host(world, f"host {rank}", lambda rank=rank, program=program: program(hosts[rank])))
    world.hosts = list(hosts)
    try:
        world.run(lambda: all(host.ended for host in hosts) or any(host.error for host in hosts))
    finally:
        for host in hosts:
            host.stop()
        world.hosts = []
    for host in hosts:
        if host.error is not None and not isinstance(host.error, SystemExit):
            raise host.error
    return [host.result for host in hosts]


class Letters:
    """Messages between the ranks of one process, in order for each pair and tag."""

    def __init__(self) -> None:
        self.sent: dict[tuple[int, int, int], deque[Tensor]] = defaultdict(deque)
        self.taken: dict[tuple[int, int, int], int] = defaultdict(int)
        self.asked: dict[tuple[int, int, int], int] = defaultdict(int)


class _Message:
    """One that is to come. Its place in the queue is that of its asking."""

    def __init__(self, letters: Letters, key: tuple[int, int, int], into: Tensor) -> None:
        self.letters, self.key, self.into = letters, key, into
        self.place = letters.asked[key]
        letters.asked[key] += 1

    def there(self) -> bool:
        return len(self.letters.sent[self.key]) > self.place

    def take(self) -> None:
        self.into.copy_(self.letters.sent[self.key][self.place])


class EmulatedMail(Mail):
    """Messages that are taken from one host to another by hand."""

    def __init__(self, host: Host, letters: Letters, rank: int, names: Sequence[int]) -> None:
        self._host, self._letters = host, letters
        self.rank, self.world_size, self.timeout_s = rank, len(names), 1e6
        self.group: Any = None
        self.names = names

    def send(self, words: Tensor, rank: int, tag: int) -> Any:
        self._letters.sent[self.rank, rank, tag].append(words.clone())
        self._host.give_way()
        return None

    def receive(self, words: Tensor, rank: int, tag: int) -> Any:
        return _Message(self._letters, (rank, self.rank, tag), words)

    def wait(self, work: Any, deadline: float, what: str) -> None:
        if work is not None:
            self._host.wait(work.there, f"words of {what}")
            work.take()
