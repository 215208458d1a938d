"""Memory that several ranks see: files of shared memory between processes, arrays for ranks inside one process."""

from __future__ import annotations

import mmap
import os
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
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

    share: gives every rank's bytes to every rank. names: what errors call ranks. Files have no name any
    more once every rank has opened them. Raises HeapError on all ranks when one of them has no memory.
    """

    def memories(index: int, size: int) -> list[np.ndarray]:
        path = FOLDER / f"flashcp-{uuid.uuid4().hex}"
        blame = f"rank {names[rank] if names else rank}: {WANTED}"
        try:
            own, paths = agreed(share, lambda: _map(path, size, make=True), OSError, blame, path.name)
            files = {other: FOLDER / name for other, name in enumerate(paths)}
            seen, _ = agreed(
                share, lambda: [own if o == rank else _map(file, size) for o, file in files.items()], OSError, blame
            )
        finally:
            path.unlink(missing_ok=True)
        return seen

    return memories


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


def _map(path: Path, size: int, make: bool = False) -> np.ndarray:
    """A file of shared memory as an array of bytes, in memory as long as somebody uses it."""
    descriptor = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if make else 0), 0o600)
    try:
        if make:
            os.posix_fallocate(descriptor, 0, size)  # a full file system is an error here, and a crash later
        return np.frombuffer(mmap.mmap(descriptor, size), dtype=np.uint8)
    finally:
        os.close(descriptor)


def agreed(
    share: Callable[[bytes], list[bytes]], make: Callable[[], Any], error: type[Exception], blame: str, word: str = ""
) -> tuple[Any, list[str]]:
    """What this rank makes, and every rank's word; all ranks call this together. Raises HeapError on all where one
    fails."""
    try:
        made, said = make(), f"+{word}"
    except error as problem:
        reason = getattr(problem, "strerror", None) or str(problem).split("\n")[0] or type(problem).__name__
        made, said = None, f"-{blame} ({reason})"
    answers = [words.decode(errors="replace") for words in share(said.encode())]
    for words in answers:
        if not words.startswith("+"):
            raise HeapError(words[1:])
    return made, [words[1:] for words in answers]
