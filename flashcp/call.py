"""An attention call on this rank: what carries and computes it, and what all ranks agreed on."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from flashcp.comm.choice import Connection
from flashcp.comm.exchanges.exchange import AttentionSettings, Exchange, IncomingKV
from flashcp.comm.handshake import Handshake
from flashcp.comm.header import Header, Step, float_code
from flashcp.kernels.inputs import check_return_lse
from flashcp.kernels.scores import Scores
from flashcp.sharding.plan import ShardingPlan


@dataclass(frozen=True)
class Call:
    """One attention call on this rank: its plan, what carries and computes it, what all ranks agreed on."""

    plan: ShardingPlan
    exchange: Exchange
    settings: AttentionSettings
    header: Header
    connection: Connection

    @property
    def handshake(self) -> Handshake | None:
        """None for one rank alone."""
        return self.connection.handshake

    def say(self, step: Step) -> Call:
        """Tell the others that this rank has come to a later step of the call; compare now, unless rows can leave and
        local ones be computed before."""
        if self.handshake is None:
            return self
        self.handshake.check_together(self.exchange.puts)
        posted = self.handshake.post(self.header._replace(step=step, **self.connection.oldest))
        if not self.exchange.transport.one_sided:
            with self.settings.clock.measure("wait_ms", "headers"):
                posted.check()
        return replace(self, settings=replace(self.settings, agree=posted.check))

    def watched(self) -> AbstractContextManager[None]:
        """See `Connection.watched`."""
        return self.connection.watched(self.header.call)


class Queries(NamedTuple):
    """What comes after keys and values: q [T, H, D], how scores are made, whether the log-sum-exp is asked for."""

    q: Tensor
    scores: Scores
    return_lse: bool


class Layer(NamedTuple):
    """What is constant in a layer, for compiled code too.

    window, chunk: see ContextParallel.attention. inputs_wait: see Exchange.
    """

    window: int | None
    chunk: int | None
    inputs_wait: bool


@dataclass
class Begun:
    """A call whose rows are on their way; `incoming` is None once they were used.

    versions: how often k and v had been written to when their rows left.
    """

    call: Call
    incoming: IncomingKV | None
    k: Tensor
    v: Tensor
    versions: tuple[int, int]

    def take(self) -> IncomingKV:
        """The rows. Raises RuntimeError when they were used, or when k or v were written to."""
        if self.incoming is None:
            raise RuntimeError("this handle's rows were used: prefetch again for another attention call")
        if versions(self.k, self.v) != self.versions:
            raise RuntimeError("k or v were changed in place after prefetch: their rows have left already")
        return self.incoming


def versions(k: Tensor, v: Tensor) -> tuple[int, int]:
    """How often each was written to (inference tensors do not count)."""
    return tuple(0 if x.is_inference() else x._version for x in (k, v))  # type: ignore[return-value]


def query_codes(queries: Queries) -> dict[str, int]:
    """What a header says of queries and their scores."""
    q, scores, return_lse = queries
    check_return_lse(return_lse)
    scale, softcap = map(float_code, scores[:2])
    with_sinks = scores.sinks is not None
    return {
        "query_heads": q.shape[1],
        "scale": scale,
        "softcap": softcap,
        "sinks": int(with_sinks),
        "log_sums": int(return_lse),
    }
