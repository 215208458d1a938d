"""Memory that several ranks see: files of shared memory between processes, arrays for ranks inside one process."""

from __future__ import annotations

import mmap
import os
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from flashcp.comm.errors import HeapError

__all__ = ["FOLDER", "agree", "shared_memories", "tried", "virtual_memories"]

FOLDER = Path("/dev/shm")
Memory = TypeVar("Memory")


def shared_memories(rank: int, share: Callable[[bytes], list[bytes]]) -> Callable[[int, int], list[np.ndarray]]:
    """Between the processes of one host; all ranks call what is returned together.

    share: gives every rank's bytes to every rank. Files have no name any more once every rank has opened them. Raises
    HeapError on all ranks when one of them has no memory.
    """

    def blame(problem: str) -> str:
        return f"rank {rank}: no shared memory in {FOLDER} ({problem})" if problem else ""

    def memories(index: int, size: int) -> list[np.ndarray]:
        path = FOLDER / f"flashcp-{uuid.uuid4().hex}"
        try:
            own, problem = tried(lambda: _map(path, size, make=True), OSError)
            names = agree(share, blame(problem), path.name)
            seen, problem = tried(
                lambda: [own if other == rank else _map(FOLDER / name, size) for other, name in enumerate(names)],
                OSError,
            )
            agree(share, blame(problem))
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


def tried(make: Callable[[], Any], error: type[Exception]) -> tuple[Any, str]:
    """What it makes, or why it cannot."""
    try:
        return make(), ""
    except error as problem:
        return None, getattr(problem, "strerror", None) or str(problem).split("\n")[0] or type(problem).__name__


def agree(share: Callable[[bytes], list[bytes]], problem: str, word: str = "") -> list[str]:
    """Every rank's word; all ranks call this together. Raises HeapError on all where one has a problem."""
    said = [words.decode(errors="replace") for words in share((f"-{problem}" if problem else f"+{word}").encode())]
    for words in said:
        if not words.startswith("+"):
            raise HeapError(words[1:])
    return [words[1:] for words in said]
