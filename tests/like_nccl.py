"""A gloo group that says it is NCCL's, so that the code for NCCL runs without a GPU, and what it asks of its works.

    with like_nccl() as seen:
        cp = flashcp.ContextParallel(transport="nccl")

Only what torch.distributed does is real: rows move over gloo, in the operations that NCCL would run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from flashcp.comm.two_sided import ALL_GATHER

__all__ = ["Seen", "like_nccl"]


@dataclass
class Seen:
    """operations: names in order. waits: the arguments of each `Work.wait`. started: works that were handed out."""

    operations: list[str] = field(default_factory=list)
    waits: list[tuple[Any, ...]] = field(default_factory=list)
    started: int = 0


class _Work:
    """A work whose waits are written down."""

    def __init__(self, work: dist.Work, seen: Seen) -> None:
        self._work, self._seen = work, seen
        seen.started += 1

    def wait(self, *arguments: Any) -> bool:
        self._seen.waits.append(arguments)
        return self._work.wait(*arguments)


@contextmanager
def like_nccl(backend: str = "nccl") -> Iterator[Seen]:
    """What is made inside takes the default group for one of `backend`; its operations are written down."""
    seen = Seen()

    def watched(name: str) -> Any:
        operation = getattr(dist, name)

        def run(*arguments: Any, **rest: Any) -> Any:
            seen.operations.append(name)
            works = operation(*arguments, **rest)
            if isinstance(works, Sequence):
                return [_Work(work, seen) for work in works]
            return works and _Work(works, seen)

        return patch.object(dist, name, run)

    names = ("all_to_all_single", ALL_GATHER, "batch_isend_irecv", "all_reduce")
    with patch.object(dist, "get_backend", lambda group=None: backend):
        watches = [watched(name) for name in names]
        for watch in watches:
            watch.start()
        try:
            yield seen
        finally:
            for watch in watches:
                watch.stop()
