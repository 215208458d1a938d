"""Ranks that have joined: what they agree on before each operation of all of them, and rows as a plan deals them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Self

import torch
from torch import Tensor

from flashcp.comm.choice import Connection
from flashcp.comm.clock import Clock
from flashcp.comm.errors import ExchangeError
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.comm.exchanges.exchange import Exchange
from flashcp.comm.exchanges.heads import Heads
from flashcp.comm.handshake import CLOSED, PendingHeader
from flashcp.comm.header import UNSHARD, Header, Step, dtype_code
from flashcp.comm.transport import Transport
from flashcp.kernels.uploads import to_device
from flashcp.sharding.holders import positions_of_rank
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.values import is_whole, shown
from flashcp.unshard import local_rows, unshard
from flashcp.untraced import untraced

_GRACE_S = 5.0  # a rank with an error of its own waits this long for the others to hear of it


class JoinedRanks:
    """A rank among those that share packs. `ContextParallel` says what its attributes mean.

    exchange: the name of what carries KV between holders. refetch: whether received KV is not kept for the backward.
    verify_rows: whether checksums travel beside rows.
    """

    def __init__(self, connection: Connection, exchange: str, refetch: bool, verify_rows: bool) -> None:
        self._connection, self.transport, self.verify_rows = connection, connection.name, verify_rows
        self.stats = stats = Clock()

        def meet() -> None:
            with stats.measure("wait_ms", "headers"):
                connection.meet()

        self._transport, self._handshake, self.transport_reason, inside = connection
        self.holders, self.head_ranks = self._transport.world_size, inside.world_size if inside else 1
        self.world_size = self.holders * self.head_ranks
        self.rank = self._transport.rank * self.head_ranks + (inside.rank if inside else 0)
        self._between: Exchange = EXCHANGE_CLASSES[exchange if self.holders > 1 else "exact"](self._transport, meet)
        self._exchange = Heads(inside, self._between, meet, refetch) if inside else self._between
        self._calls, self._closed = 0, False

    @property
    def calls(self) -> int:
        """How many calls this rank has made together with the others; one pass of a layer is one."""
        return self._calls

    def close(self) -> None:
        """End this rank's part: what is under way arrives, then its threads and the groups that were made for it end.

        For all ranks, after their last backward; no rank waits for another but for rows, within the time-out. Every
        later call raises RuntimeError in one line; closing again does nothing. Receive buffers go with this object.
        As a context manager it closes at the end of the block, and where that is left by an error it does not wait.
        Raises ExchangeError as the class says.
        """
        self._close(wait=True)

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close(wait=kind is None)

    def _close(self, wait: bool) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            if wait and not (self._handshake and self._handshake.stopped):
                if self._handshake is not None:
                    self._handshake.settle()
                for level in self._levels:
                    level.synchronize()
                if self._handshake is not None:
                    self._handshake.check_noted()
        finally:
            for level in self._levels:
                level.close()
            if self._handshake is not None:
                self._handshake.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(CLOSED)

    @property
    def sent_bytes(self) -> int:
        """What has left this rank for other ranks so far, all tensors of both passes, headers not counted."""
        return sum(level.sent_bytes for level in self._levels)

    @property
    def throttle_gbps(self) -> float:
        """GB/s at which rows leave this rank, all tensors of both passes; 0: at once. Two-sided transports and NVSHMEM
        do not slow rows, whatever `options` say."""
        return max(level.throttle_gbps for level in self._levels)

    @property
    def receive_bytes(self) -> int:
        """Memory of this rank's receive buffers and gradient slots that stays allocated (one-sided transports)."""
        return sum(level.receive_bytes for level in self._levels)

    def shard(self, x: Tensor, plan: ShardingPlan, dim: int = 0) -> Tensor:
        """This rank's rows of a tensor that holds the whole pack along `dim`, in local order."""
        self._check_plan(plan)
        _check_dim("x", x, dim)
        if x.shape[dim] != plan.offsets[-1]:
            raise ValueError(f"x has {x.shape[dim]} rows along dim {dim}: expected the pack's {plan.offsets[-1]}")
        return x.index_select(dim, local_rows(plan, self.rank, self.head_ranks, x.device).here())

    @untraced
    def unshard(self, local: Tensor, plan: ShardingPlan, dim: int = 0) -> Tensor:
        """The whole pack along `dim` on every rank, from each rank's rows; differentiable."""

        def header() -> Header:
            self._check_plan(plan)
            _check_dim("local", local, dim)
            tokens = self._exchange.tokens(plan)
            if local.shape[dim] != tokens:
                raise ValueError(
                    f"local has {local.shape[dim]} rows along dim {dim}: expected {tokens} on rank {self.rank}"
                )
            row = local.shape[:dim] + local.shape[dim:][1:]
            gradients = torch.is_grad_enabled() and local.requires_grad
            row_bytes = math.prod(row) * local.element_size()
            return Header(**header_codes(plan, local), exchange=UNSHARD, row_bytes=row_bytes, gradients=gradients)

        agreed, posted = self._agree(header)
        if posted is not None:
            posted.check()
        rows = local.movedim(dim, 0).contiguous()
        return unshard(rows, plan, self._connection, agreed).movedim(0, dim)

    def synchronize(self) -> None:
        """Wait for what is under way, both passes, and raise what went wrong on the way, on all ranks or on none.

        On GPUs the host is ahead of the streams, and an error is known only when they come to it. Call this before an
        optimizer step, on all ranks at the same point: gradients that were computed from rows which never came must not
        be taken by any rank. Raises ExchangeError as the class says.
        """
        header = Header(call=self._calls, step=Step.SYNCHRONIZE)
        try:
            self._check_together()
            for level in self._levels:
                level.synchronize()
        except ExchangeError as error:
            if self._handshake is not None:
                self._handshake.stop(error)
                with suppress(ExchangeError):
                    self._handshake.compare(header._replace(failed=1), _GRACE_S)
            raise
        if self._handshake is not None:
            self._handshake.compare(header._replace(**self._connection.oldest))

    def position_ids(self, plan: ShardingPlan, device: torch.device | str | None = None) -> Tensor:
        """Position inside its document of each of this rank's rows, int64 [rank's tokens], on a device (None: the
        CPU). Raises ValueError for what is no device."""
        self._check_plan(plan)
        place = None if device is None else _read_device(device)
        positions = torch.from_numpy(positions_of_rank(plan, self.rank, self.head_ranks))
        return positions if place is None else to_device(positions, place)

    def _agree(self, make_header: Callable[[], Header]) -> tuple[Header, PendingHeader | None]:
        """Check this rank's arguments and tell the others, who also hear of an error here.

        What they tell is compared now, but under a one-sided transport only before this rank reads their rows.
        """
        self._check_together()
        self._calls += 1
        try:
            header = make_header()._replace(call=self._calls, verify_rows=self.verify_rows, **self._connection.oldest)
        except Exception:
            if self._handshake is not None:
                with suppress(ExchangeError):
                    self._handshake.compare(Header(failed=1, call=self._calls), _GRACE_S)
            raise
        if self._handshake is None:
            return header, None
        posted = self._handshake.post(header)
        if not self._exchange.transport.one_sided:
            posted.check()
        return header, posted

    @property
    def _levels(self) -> list[Transport]:
        """The transports inside this rank's holder and between holders."""
        return [level for level in (self._connection.inside, self._transport) if level is not None]

    def _check_together(self) -> None:
        """Raise where this was closed, or an earlier error left the ranks with different receive buffers."""
        self._check_open()
        if self._handshake is not None:
            self._handshake.check_together(self._exchange.puts)

    def _check_plan(self, plan: ShardingPlan) -> None:
        self._check_open()
        if not isinstance(plan, ShardingPlan):
            raise ValueError(f"plan is a {type(plan).__name__}: expected a ShardingPlan")
        if plan.world_size != self.holders:
            whose = (
                f"one for {self.holders} holders of {self.head_ranks} ranks"
                if self.head_ranks > 1
                else (f"the group's {self.holders}")
            )
            raise ValueError(f"plan for {plan.world_size} ranks: expected {whose}")


def _check_dim(name: str, x: Tensor, dim: int) -> None:
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        raise ValueError(f"{name} is a {type(x).__name__}: expected a dense tensor")
    if not is_whole(dim):
        raise ValueError(f"dim={shown(dim)}: expected a whole number")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim={shown(dim)}: expected an axis of {name}, which has {x.dim()}")


def _read_device(device: object) -> torch.device:
    """Raises ValueError for what is no device."""
    if isinstance(device, torch.device | str):
        with suppress(RuntimeError):
            return torch.device(device)
    raise ValueError(f"device={shown(device)}: expected a torch.device, its name, or None")


def header_codes(plan: ShardingPlan, x: Tensor) -> dict[str, int]:
    """What a header says of both: the fingerprint as an int64, the same number for the same dtype on every rank."""
    fingerprint = int.from_bytes(bytes.fromhex(plan.fingerprint), "big", signed=True)
    return {"plan": fingerprint, "dtype": dtype_code(x.dtype)}


def check_rows(name: str, x: Tensor, tokens: int, rank: int) -> None:
    """Raises ValueError unless x is a dense tensor of a rank's rows."""
    _check_dim(name, x, 0)
    if len(x) != tokens:
        raise ValueError(f"{name} has {len(x)} rows: expected {tokens} on rank {rank}")
