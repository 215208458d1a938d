"""On every call every rank tells every other what it is about to do; they go on only if all say the same.

This runs in the forward and in the backward pass, unconditionally: a rank that reuses an old plan cannot know that it
should check. Headers go point to point, so that whoever is missing can be named. Posting a header and reading the
others' are two steps: under a one-sided transport rows leave and local tiles run in between.

Where h ranks share a holder's heads, headers travel in two hops: to the other ranks of the holder, and from there,
together, to the rank of the same place in every other holder. Every rank then knows what all ranks said, or that they
said nothing, and has sent h - 1 + N / h - 1 messages instead of N - 1.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress

import torch
import torch.distributed as dist
from torch import Tensor

from flashcp.comm.errors import (
    NEW_GROUP,
    ExchangeError,
    ExchangeTimeoutError,
    PeerFailedError,
    PlanMismatchError,
    RowsDifferError,
)
from flashcp.comm.header import COMPARED, Header, disagreement, named
from flashcp.comm.mail import Mail

_AHEAD = 8  # headers posted and not yet compared
CLOSED = "this ContextParallel was closed: make another one"
_FAILED, _ABSENT = 1, 2  # in a header's `failed`
_MOST_RANKS = 1 << 20
_HOP_S = 1.0  # what news of a rank that stays away may take from its holder to the others


class Handshake:
    """Compares the headers of all ranks, every call within the time-out.

    across: reaches the rank of the same place in every other holder. inside: reaches the other ranks of this holder;
    None where a rank is a holder. Both name a rank by its number among all.
    stopped: why ranks may have come apart, by an error that was raised here; empty while all is well. group_ended:
    whether it took the process group along. abandoned: whether this rank then left the others where they were.
    call: which one this rank is at.
    oldest: the least `oldest` and `oldest_inside` of all ranks in the headers compared last: the same on all ranks at
    the same point of the program.
    """

    def __init__(self, across: Mail, inside: Mail | None = None) -> None:
        self.across, self.inside = across, inside
        self.head_ranks = inside.world_size if inside else 1
        self.rank, self.world_size = across.names[across.rank], across.world_size * self.head_ranks
        self.timeout_s = across.timeout_s
        self.oldest = [0, 0]
        self.stopped, self.group_ended, self.abandoned, self.closed = "", False, False, False
        self.call, self._noted = 0, 0
        self._posted: deque[PendingHeader] = deque()
        self._last_words: list[dist.Work | None] = []

    def compare(self, header: Header, timeout_s: float | None = None) -> None:
        """Return when all ranks sent this very header.

        Raises on every rank: PlanMismatchError naming who differs in what, PeerFailedError naming the ranks that
        failed, ExchangeTimeoutError naming the ranks that did not come. Other holders hear of a rank that stays away
        within twice the time-out.
        """
        self.post(header, timeout_s).check()

    def post(self, header: Header, timeout_s: float | None = None) -> PendingHeader:
        """Send a header; `check` of what is returned waits for the others' and raises as `compare` does."""
        if self.closed:
            raise RuntimeError(CLOSED)
        while len(self._posted) >= _AHEAD:
            self._posted[0].check()
        header = header._replace(failed=header.failed or self._noted)
        try:
            posted = PendingHeader(self, header, self.timeout_s if timeout_s is None else timeout_s)
            self._posted.append(posted)
            if self.inside is None:  # there is nobody to hear first
                posted.pass_on()
        except ExchangeError as error:
            self.stop(error)
            raise
        return posted

    def note(self, source: int) -> None:
        """Rows of rank `source` came to this rank that are not those that were sent: its next header says so, and all
        ranks raise RowsDifferError when they compare it. The first one counts."""
        self._noted = self._noted or -(1 + source + _MOST_RANKS * self.call)

    def check_noted(self) -> None:
        """Raises RowsDifferError for what was noted since headers were compared: where no other header follows."""
        if self._noted:
            _judge_rows({self.rank: self._noted})

    def check_together(self, puts: bool) -> None:
        """Raises ExchangeError where an earlier error may have left ranks at different points of the program. puts:
        whether rows are put into others' memory, where any error may have."""
        if self.stopped and (puts or self.abandoned or self.group_ended):
            advice = NEW_GROUP if self.group_ended else "make a new ContextParallel"
            raise ExchangeError(f"ranks came apart at an earlier error, {advice}: {self.stopped}", self.group_ended)

    def stop(self, error: ExchangeError) -> None:
        """Ranks may have come apart by an error that was raised here; the first one counts."""
        self.stopped = self.stopped or str(error)
        self.group_ended |= error.ends_group

    def meet_inside(self) -> None:
        """Return when the ranks of this holder agree on all headers posted so far, and the other holders were told.
        Raises as `compare` does where they do not agree."""
        for posted in list(self._posted):
            posted.pass_on()
            if posted.differs:
                posted.check()

    def settle(self) -> None:
        """Check all headers posted so far."""
        while self._posted:
            self._posted[0].check()

    def close(self) -> None:
        """Nothing is said any more."""
        self.closed = True
        for mail in (self.across, self.inside):
            if mail is not None:
                mail.close()

    def abandon(self, call: int) -> None:
        """Tell the others, who come to it at their next call, that this rank has failed; waits for nobody."""
        self.abandoned = True
        holder = torch.zeros(self.head_ranks, len(Header._fields), dtype=torch.int64)
        words = holder[self.rank % self.head_ranks]
        words[:2] = torch.tensor([self._noted or _FAILED, call])
        for mail, said in ((self.inside, words), (self.across, holder)):
            for rank in mail.others if mail else []:
                with suppress(RuntimeError):
                    self._last_words.append(mail.send(said, rank, mail.tag))  # type: ignore[union-attr]


class PendingHeader:
    """A header that was sent, and the others' on their way.

    differs: whether, after `pass_on`, a rank of this holder is known to have failed, stayed away or said something
    else.
    """

    def __init__(self, handshake: Handshake, header: Header, timeout_s: float) -> None:
        self._handshake, self._header, self._timeout_s = handshake, header, timeout_s
        across, inside, words = handshake.across, handshake.inside, len(header)
        self._headers = torch.zeros(across.world_size, handshake.head_ranks, words, dtype=torch.int64)
        self._holder = self._headers[across.rank]
        own = self._holder[handshake.rank % handshake.head_ranks]
        own[:] = torch.tensor(header)
        self._passed_on = self.differs = False
        self._missing: list[int] = []
        self._gone: ExchangeError | None = None
        self._inside = (
            {rank: inside.receive(self._holder[rank], rank, inside.tag) for rank in inside.others} if inside else {}
        )
        self._across = {rank: across.receive(self._headers[rank], rank, across.tag) for rank in across.others}
        self._sends = [(inside, rank, inside.send(own, rank, inside.tag)) for rank in inside.others] if inside else []

    def pass_on(self) -> None:
        """Wait for the other ranks of this holder, earlier headers first, and tell the other holders what was said;
        done once. Raises nothing that `check` does not."""
        for posted in list(self._handshake._posted):
            posted._pass_on()
            if posted is self:
                return

    def check(self) -> None:
        """Wait for the others' headers, earlier ones first, and compare; done once. Raises as `Handshake.compare`."""
        queue = self._handshake._posted
        while self in queue:
            try:
                queue.popleft()._compare()
            except ExchangeError as error:
                self._handshake.stop(error)
                raise

    def _pass_on(self) -> None:
        if self._passed_on:
            return
        self._passed_on = True
        if self._handshake.inside:
            self._hear(self._handshake.inside, self._inside, self._timeout_s)
            for name in self._missing:
                self._holder[name % len(self._holder), 0] = _ABSENT
            said = self._holder[:, : len(COMPARED)]
            self.differs = bool(said[:, 0].any() or (said != said[0]).any())
        across = self._handshake.across
        self._sends += [(across, rank, across.send(self._holder, rank, across.tag)) for rank in across.others]

    def _hear(self, mail: Mail, receives: dict[int, dist.Work | None], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        for rank, receive in receives.items():
            try:
                mail.wait(receive, deadline, f"rank {mail.names[rank]}")
            except ExchangeError as error:
                # After one time-out gloo closes what else it waits for. Its clock counts whole milliseconds: a wait
                # may end a little before our deadline, so the kind of the error decides and not the time.
                is_gone = not (self._missing or isinstance(error, ExchangeTimeoutError))
                self._missing.append(mail.names[rank])
                if is_gone:
                    self._gone = error
                    return

    def _compare(self) -> None:
        handshake, header = self._handshake, self._header
        self._pass_on()
        if not self._missing:
            # A rank of another holder may come as late as the time-out, and wait as long for one that stays away.
            patience_s = 2 * self._timeout_s + _HOP_S if handshake.inside else self._timeout_s
            self._hear(handshake.across, self._across, patience_s)
        if self._gone:
            raise self._gone
        if self._missing:
            raise ExchangeTimeoutError(
                f"rank {handshake.rank} waited {self._timeout_s:g} s: {named(self._missing)} did not come to the "
                f"exchange (call {header.call})",
                ends_group=True,
            )
        headers = self._headers.flatten(0, 1)
        try:
            _judge(headers, header)
        except ExchangeError as error:
            handshake._last_words += [work for *_, work in self._sends]  # who has failed does not fetch them
            if isinstance(error, RowsDifferError):
                handshake._noted = 0  # all know
            raise
        deadline = time.monotonic() + self._timeout_s
        for mail, rank, work in self._sends:
            mail.wait(work, deadline, f"its header to reach rank {mail.names[rank]}")
        handshake.oldest = headers[:, -2:].amin(0).tolist()
        if header.failed > 0 and not headers[:, 0].all():
            handshake.stopped = handshake.stopped or f"rank {handshake.rank} failed alone (call {header.call})"


def _judge(headers: Tensor, mine: Header) -> None:
    if mine.failed > 0:
        return  # this rank has an error of its own to raise
    _judge_rows(dict(enumerate(headers[:, 0].tolist())))
    for code, error, what in (
        (_FAILED, PeerFailedError, "stopped with an error before the exchange (call {call}); see its own message"),
        (
            _ABSENT,
            ExchangeTimeoutError,
            "did not come to the exchange (call {call}), as the other ranks of its holder say",
        ),
    ):
        ranks = (headers[:, 0] == code).nonzero().flatten().tolist()
        if ranks:
            raise error(f"{named(ranks)} {what.format(call=mine.call)}", ends_group=code == _ABSENT)
    if words := disagreement(headers.tolist(), mine.call):
        raise PlanMismatchError(words)


def _judge_rows(failed: Mapping[int, int]) -> None:
    """failed: of the headers of some ranks."""
    readers: dict[tuple[int, int], list[int]] = {}
    for reader, code in failed.items():
        if code < 0:
            readers.setdefault(divmod(-code - 1, _MOST_RANKS), []).append(reader)
    if readers:
        said = (
            f"{named(some)} received rows of rank {source} that are not those that were sent (call {call})"
            for (call, source), some in sorted(readers.items())
        )
        raise RowsDifferError("; ".join(said))
