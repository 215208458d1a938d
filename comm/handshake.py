"""Before rows move, every rank tells every other what it is about to do; they go on only if all say the same.

This runs on every call, in the forward and in the backward pass: a rank that reuses an old plan cannot know that it
should check. Headers go point to point, so that whoever is missing can be named.
"""

from __future__ import annotations

import time
from enum import IntEnum
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flashcp.comm.errors import ExchangeTimeoutError, PeerFailedError, PlanMismatchError
from flashcp.comm.transport import bounded

__all__ = ["Handshake", "Header", "Step"]

_TAG = 7701  # keeps headers apart from rows on the same pair of ranks


class Step(IntEnum):
    """The moments of one call at which ranks compare notes."""

    BEGIN = 0
    ATTENTION = 1
    BACKWARD = 2


class Header(NamedTuple):
    """What a rank is about to do, one int64 each.

    failed: 1 when it stopped with an error of its own. step: which exchange of the call, a `Step`. query_heads and
    scale: 0 while only KV leaves. dtype and scale: codes that differ when the values do.
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


class Handshake:
    """Compares headers within a group, every call within the time-out."""

    def __init__(self, group: dist.ProcessGroup | None, timeout_s: float) -> None:
        self.group = group if dist.get_backend(group) == "gloo" else _gloo_beside(group)
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.timeout_s = timeout_s

    def compare(self, header: Header, timeout_s: float | None = None) -> None:
        """Return when all ranks sent this very header.

        Raises on every rank: PlanMismatchError naming who differs in what, PeerFailedError naming the ranks that
        failed, ExchangeTimeoutError naming the ranks that did not come.
        """
        limit = self.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        headers = torch.empty(self.world_size, len(header), dtype=torch.int64)
        headers[self.rank] = torch.tensor(header)
        with bounded(limit, self.rank, "headers to leave"):
            arrivals = {rank: dist.irecv(headers[rank], group=self.group, tag=_TAG, group_src=rank) for rank in others}
            departures = [dist.isend(headers[self.rank], group=self.group, tag=_TAG, group_dst=rank) for rank in others]
        missing = []
        for rank, arrival in arrivals.items():
            try:
                self._wait(arrival, deadline, f"rank {rank}")
            except ExchangeTimeoutError:
                missing.append(rank)
        if missing:
            raise ExchangeTimeoutError(
                f"rank {self.rank} waited {limit:g} s: {_named(missing)} did not come to the exchange "
                f"(call {header.call})"
            )
        for departure in departures:
            self._wait(departure, deadline, "headers to leave")
        _judge(headers, header)

    def _wait(self, work: dist.Work | None, deadline: float, what: str) -> None:
        if work is not None:
            with bounded(deadline - time.monotonic(), self.rank, what) as limit:
                work.wait(limit)


def _judge(headers: Tensor, mine: Header) -> None:
    failed = headers[:, 0].nonzero().flatten().tolist()
    if failed:
        if mine.failed:
            return  # this rank has an error of its own to raise
        raise PeerFailedError(
            f"{_named(failed)} stopped with an error before the exchange (call {mine.call}); see its own message"
        )
    for field, values in zip(Header._fields, headers.T.tolist(), strict=True):
        if len(set(values)) > 1:
            groups = sorted(set(values), key=lambda value: (values.count(value), value))
            said = "; ".join(
                f"{_named([rank for rank, value in enumerate(values) if value == said])} {_shown(field, said)}"
                for said in groups
            )
            raise PlanMismatchError(f"ranks disagree on {field.replace('_', ' ')} (call {mine.call}): {said}")


def _shown(field: str, value: int) -> str:
    return f"{value % (1 << 64):016x}" if field == "plan" else str(value)


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _gloo_beside(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Headers are host data: beside a GPU group they use gloo, so that no stream waits for them."""
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
