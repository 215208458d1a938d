"""On every call every rank tells every other what it is about to do; they go on only if all say the same.

This runs in the forward and in the backward pass, unconditionally: a rank that reuses an old plan cannot know that it
should check. Headers go point to point, so that whoever is missing can be named. Posting a header and reading the
others' are two steps: under a one-sided transport rows leave and local tiles run in between.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from enum import IntEnum
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flashcp.comm.errors import ExchangeError, ExchangeTimeoutError, PeerFailedError, PlanMismatchError
from flashcp.comm.waits import bounded

_TAG, _SHARE_TAG = 7701, 7702  # keep headers apart from rows on the same pair of ranks
_WORDS = 256  # bytes that a rank can share
_AHEAD = 8  # headers posted and not yet compared


class Step(IntEnum):
    """The moments at which ranks compare notes: those of one call, and the end of all so far."""

    BEGIN = 0
    ATTENTION = 1
    BACKWARD = 2
    SYNCHRONIZE = 3


class Header(NamedTuple):
    """What a rank is about to do, one int64 each.

    failed: 1 when it stopped with an error of its own. step: which exchange of the call, a `Step`. query_heads and
    scale: 0 while only KV leaves. dtype and scale: codes that differ when the values do. oldest: the oldest inbox that
    the rank still reads; it is passed on, not compared.
    """

    failed: int = 0
    call: int = 0
    step: int = 0
    plan: int = 0
    exchange: int = 0
    query_heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    row_bytes: int = 0
    dtype: int = 0
    scale: int = 0
    gradients: int = 0
    refetch: int = 0
    oldest: int = 0


class Handshake:
    """Compares headers within a group, every call within the time-out.

    stopped: why ranks may have come apart, by an error that was raised here; empty while all is well.
    oldest: the least `oldest` of all ranks in the headers compared last: the same on all ranks at the same point of
    the program.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout_s: float) -> None:
        if dist.get_backend(group) != "gloo":  # headers are host data: beside a GPU group no stream waits for them
            ranks = dist.get_process_group_ranks(group)
            group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        self.group = group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.timeout_s = timeout_s
        self.oldest = 0
        self.stopped = ""
        self._posted: deque[PendingHeader] = deque()
        self._last_words: list[dist.Work | None] = []

    def compare(self, header: Header, timeout_s: float | None = None) -> None:
        """Return when all ranks sent this very header.

        Raises on every rank: PlanMismatchError naming who differs in what, PeerFailedError naming the ranks that
        failed, ExchangeTimeoutError naming the ranks that did not come.
        """
        self.post(header, timeout_s).check()

    def post(self, header: Header, timeout_s: float | None = None) -> PendingHeader:
        """Send a header; `check` of what is returned waits for the others' and raises as `compare` does."""
        while len(self._posted) >= _AHEAD:
            self._posted[0].check()
        posted = PendingHeader(self, header, self.timeout_s if timeout_s is None else timeout_s)
        self._posted.append(posted)
        return posted

    def check_together(self) -> None:
        """Raises ExchangeError where an earlier error may have left ranks at different points of the program."""
        if self.stopped:
            raise ExchangeError(f"ranks came apart at an earlier error, make a new ContextParallel: {self.stopped}")

    def settle(self) -> None:
        """Check all headers posted so far."""
        while self._posted:
            self._posted[0].check()

    def abandon(self, call: int) -> None:
        """Tell the others, who come to it at their next call, that this rank has failed; waits for nobody."""
        with suppress(RuntimeError):
            words = torch.tensor(Header(failed=1, call=call))
            self._last_words += [self._send(words, rank, _TAG) for rank in self._others]

    def share(self, words: bytes) -> list[bytes]:
        """A few bytes of every rank, in rank order, as `compare` moves headers."""
        padded = torch.frombuffer(bytearray(words[:_WORDS].ljust(_WORDS, b"\0")), dtype=torch.uint8).clone()
        mail = torch.empty((self.world_size, _WORDS), dtype=torch.uint8)
        mail[self.rank] = padded
        works = [self._receive(mail[rank], rank, _SHARE_TAG) for rank in self._others]
        works += [self._send(padded, rank, _SHARE_TAG) for rank in self._others]
        deadline = time.monotonic() + self.timeout_s
        for work in works:
            self._wait(work, deadline, "the other ranks to set up memory")
        return [bytes(row.tolist()).rstrip(b"\0") for row in mail]

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank != self.rank]

    def _send(self, words: Tensor, rank: int, tag: int) -> dist.Work | None:
        return dist.isend(words, group=self.group, tag=tag, group_dst=rank)

    def _receive(self, words: Tensor, rank: int, tag: int) -> dist.Work | None:
        return dist.irecv(words, group=self.group, tag=tag, group_src=rank)

    def _wait(self, work: dist.Work | None, deadline: float, what: str) -> None:
        if work is not None:
            with bounded(deadline - time.monotonic(), self.rank, what) as limit:
                work.wait(limit)


class PendingHeader:
    """A header that was sent, and the others' on their way."""

    def __init__(self, handshake: Handshake, header: Header, timeout_s: float) -> None:
        self._handshake, self._header, self._timeout_s = handshake, header, timeout_s
        self._headers = torch.empty(handshake.world_size, len(header), dtype=torch.int64)
        self._headers[handshake.rank] = torch.tensor(header)
        own = self._headers[handshake.rank]
        with bounded(timeout_s, handshake.rank, "headers to leave"):
            self._receives = {rank: handshake._receive(self._headers[rank], rank, _TAG) for rank in handshake._others}
            self._sends = [handshake._send(own, rank, _TAG) for rank in handshake._others]

    def check(self) -> None:
        """Wait for the others' headers, earlier ones first, and compare; done once. Raises as `Handshake.compare`."""
        queue = self._handshake._posted
        while self in queue:
            try:
                queue.popleft()._compare()
            except ExchangeError as error:
                self._handshake.stopped = self._handshake.stopped or str(error)
                raise

    def _compare(self) -> None:
        handshake, header = self._handshake, self._header
        deadline = time.monotonic() + self._timeout_s
        missing = list[int]()
        for rank, receive in self._receives.items():
            try:
                handshake._wait(receive, deadline, f"rank {rank}")
            except ExchangeError as error:
                # After one time-out gloo closes what else it waits for. Its clock counts whole milliseconds: a wait
                # may end a little before our deadline, so the kind of the error decides and not the time.
                if not (missing or isinstance(error, ExchangeTimeoutError)):
                    raise
                missing.append(rank)
        if missing:
            raise ExchangeTimeoutError(
                f"rank {handshake.rank} waited {self._timeout_s:g} s: {_named(missing)} did not come to the exchange "
                f"(call {header.call})"
            )
        try:
            _judge(self._headers, header)
        except ExchangeError:
            handshake._last_words += self._sends  # who has failed does not fetch them
            raise
        for send in self._sends:
            handshake._wait(send, deadline, "headers to leave")
        handshake.oldest = int(self._headers[:, -1].min())
        if header.failed and not self._headers[:, 0].all():
            handshake.stopped = handshake.stopped or f"rank {handshake.rank} failed alone (call {header.call})"


def _judge(headers: Tensor, mine: Header) -> None:
    failed = headers[:, 0].nonzero().flatten().tolist()
    if failed:
        if mine.failed:
            return  # this rank has an error of its own to raise
        raise PeerFailedError(
            f"{_named(failed)} stopped with an error before the exchange (call {mine.call}); see its own message"
        )
    for field, values in list(zip(Header._fields, headers.T.tolist(), strict=True))[:-1]:
        if len(set(values)) > 1:
            said = "; ".join(
                f"{_named([rank for rank, value in enumerate(values) if value == each])} "
                f"{f'{each % (1 << 64):016x}' if field == 'plan' else each}"
                for each in sorted(set(values), key=lambda value: (values.count(value), value))
            )
            raise PlanMismatchError(f"ranks disagree on {field.replace('_', ' ')} (call {mine.call}): {said}")


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
