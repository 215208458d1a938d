"""Memory that several ranks see: files of shared memory between processes, arrays for ranks inside one process."""

from __future__ import annotations

import errno
import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from flashcp.comm.errors import HeapError

FOLDER = Path("/dev/shm")
WANTED = f"no shared memory in {FOLDER}; transport='gloo' needs none, a container gets more by its --shm-size"
Memory = TypeVar("Memory")


def shared_memories(
    rank: int, share: Callable[[bytes], list[bytes]], names: Sequence[int] | None = None
) -> Callable[[int, int], list[np.ndarray]]:
    """Between the processes of one host; all ranks call what is returned together.

    share: gives every rank's bytes to every rank. names: what errors call ranks. Raises HeapError on all ranks when
    one of them has no memory.
    """

    def memories(index: int, size: int) -> list[np.ndarray]:
        blame = f"rank {names[rank] if names else rank}: {WANTED}"
        with ExitStack() as closing:

            def make() -> int:
                descriptor = closing.enter_context(_unnamed_file())
                os.posix_fallocate(descriptor, 0, size)  # a full file system is an error here, and a crash later
                return descriptor

            _, files = agreed(share, make, OSError, blame, lambda descriptor: f"/proc/{os.getpid()}/fd/{descriptor}")
            # Every rank has opened every file, or failed, when this is over: only then may they be closed.
            seen, _ = agreed(share, lambda: [_map(file, size) for file in files], OSError, blame)
        return seen

    return memories


def has_shared_memory() -> bool:
    """Whether processes of this host can share memory."""
    try:
        with _unnamed_file():
            return True
    except OSError:
        return False


def virtual_memories(ranks: int, make: Callable[[int], Memory]) -> Callable[[int, int], list[Memory]]:
    """For ranks inside one process: all that ask for one index get the same memories, `make(size)` of each rank."""
    made: dict[int, list[Memory]] = {}
    asked: Counter[int] = Counter()

    def memories(index: int, size: int) -> list[Memory]:
        if index not in made:
            made[index] = [make(size) for _ in range(ranks)]
        asked[index] += 1
        return made.pop(index) if asked[index] == ranks else made[index]  # from then on they live with their regions

    return memories


@contextmanager
def _unnamed_file() -> Iterator[int]:
    """A new file of shared memory, which lives on where it is mapped. Processes of this host open it as a file of this
    process's: it never has a name in the folder, so that a rank that is killed leaves nothing there."""
    if not FOLDER.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    descriptor = os.open(FOLDER, os.O_RDWR | os.O_TMPFILE, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _map(file: str, size: int) -> np.ndarray:
    """A file of shared memory as an array of bytes, in memory as long as somebody uses it."""
    descriptor = os.open(file, os.O_RDWR)
    try:
        return np.frombuffer(mmap.mmap(descriptor, size), dtype=np.uint8)
    finally:
        os.close(descriptor)


def agreed(
    share: Callable[[bytes], list[bytes]],
    make: Callable[[], Any],
    error: type[Exception],
    blame: str,
    word: Callable[[Any], str] = lambda made: "",
) -> tuple[Any, list[str]]:
    """What this rank makes, and every rank's word for what it made; all ranks call this together.

    Raises HeapError on all where one fails.
    """
    try:
        made = make()
        said = f"+{word(made)}"
    except error as problem:
        reason = getattr(problem, "strerror", None) or str(problem).split("\n")[0] or type(problem).__name__
        made, said = None, f"-{blame} ({reason})"
    answers = [words.decode(errors="replace") for words in share(said.encode())]
    for words in answers:
        if not words.startswith("+"):
            raise HeapError(words[1:])
    return made, [words[1:] for words in answers]
