"""Messages of a few bytes between the ranks of one group, point to point over gloo, so that who is missing is known."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from flashcp.comm.ending import end_group, make_group
from flashcp.comm.waits import bounded

_SHARED, _HEADERS = 7702, 1 << 17  # tags, apart from those of rows (`two_sided.py`)
_WORDS = 256  # bytes that a rank can share


class Mail:
    """names: what messages and errors call the ranks of the group; their numbers in it unless said otherwise. tag: of
    headers, which other mail over the same ranks may have too (`set_apart`)."""

    tag = _HEADERS
    _made: ClassVar[list[int]] = [0]  # how many were set apart on this rank, or on one that it shared a group with

    def __init__(self, group: dist.ProcessGroup | None, timeout_s: float, names: Sequence[int] | None = None) -> None:
        self._own: dist.ProcessGroup | None = None
        if dist.get_backend(group) != "gloo":  # host data: beside a GPU group no stream waits for it
            ranks = dist.get_process_group_ranks(group)
            group = self._own = make_group(ranks, "gloo")
        self.group, self.timeout_s = group, timeout_s
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.names = range(self.world_size) if names is None else names

    @property
    def others(self) -> list[int]:
        """All ranks but this one."""
        return [rank for rank in range(self.world_size) if rank != self.rank]

    def send(self, words: Tensor, rank: int, tag: int) -> dist.Work | None:
        """Start to send. Nobody may write to the words before `wait`. Raises ExchangeError where it cannot start."""
        with bounded(self.timeout_s, self.names[self.rank], f"words to leave for rank {self.names[rank]}"):
            return dist.isend(words, group=self.group, tag=tag, group_dst=rank)

    def receive(self, words: Tensor, rank: int, tag: int) -> dist.Work | None:
        """Start to receive: what a rank sent first comes first. Raises ExchangeError where it cannot start."""
        with bounded(self.timeout_s, self.names[self.rank], f"rank {self.names[rank]}"):
            return dist.irecv(words, group=self.group, tag=tag, group_src=rank)

    def set_apart(self) -> None:
        """Give headers a tag of their own: those of an earlier operator that failed may still be on their way. Every
        rank of the group must call it."""
        self._made[0] = 1 + max(int(words) for words in self.share(b"%d" % self._made[0]))
        self.tag = _HEADERS + self._made[0]

    def wait(self, work: dist.Work | None, deadline: float, what: str) -> None:
        """Return when a message has come or left. Raises ExchangeTimeoutError past the deadline, ExchangeError when the
        other rank is gone."""
        if work is not None:
            with bounded(deadline - time.monotonic(), self.names[self.rank], what) as limit:
                work.wait(limit)

    def share(self, words: bytes) -> list[bytes]:
        """A few bytes of every rank, in rank order. Raises ExchangeError as `wait` does."""
        padded = torch.frombuffer(bytearray(words[:_WORDS].ljust(_WORDS, b"\0")), dtype=torch.uint8).clone()
        arrived = torch.empty((self.world_size, _WORDS), dtype=torch.uint8)
        arrived[self.rank] = padded
        works = [(rank, self.receive(arrived[rank], rank, _SHARED)) for rank in self.others]
        works += [(rank, self.send(padded, rank, _SHARED)) for rank in self.others]
        deadline = time.monotonic() + self.timeout_s
        for rank, work in works:
            self.wait(work, deadline, f"rank {self.names[rank]} to set up memory")
        return [bytes(row.tolist()).rstrip(b"\0") for row in arrived]

    def close(self) -> None:
        """End the group that was made for these messages, if one was."""
        if self._own is not None:
            end_group(self._own)
