"""The end of threads and groups that are ours: when an operator is closed, and before Python is torn down.

A thread that comes out of torch while Python is torn down cannot have the GIL any more. Python before 3.14 ends such a
thread where it stands, inside of torch's C++, and with it the process: `terminate called without an active exception`,
exit code 134. So they end before, in a hook that Python calls while all else still stands.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist


class Closable(Protocol):
    """What owns a thread: `close` ends it, and waits for nobody else."""

    def close(self) -> None: ...


_owners: weakref.WeakSet[Closable] = weakref.WeakSet()
_groups: list[dist.ProcessGroup] = []


def ends_before_python(owner: Closable) -> None:
    """Let it be closed at exit, if it lives until then."""
    _owners.add(owner)


def make_group(ranks: Sequence[int], backend: str | None, timeout: timedelta | None = None) -> dist.ProcessGroup:
    """A group of some processes, whose members alone call this; destroyed at exit."""
    group = dist.new_group(ranks, timeout=timeout, backend=backend, use_local_synchronization=True)
    _groups.append(group)
    return group


def end_group(group: dist.ProcessGroup) -> None:
    """Destroy a group that `make_group` made; nothing where it went with the default one."""
    if group in _groups:
        _groups.remove(group)
        with suppress(ValueError, AssertionError):
            dist.destroy_process_group(group)


@atexit.register
def _end_all() -> None:
    for owner in list(_owners):
        with suppress(Exception):  # at exit there is nobody to tell
            owner.close()
    for group in list(_groups):
        with suppress(Exception):
            end_group(group)
