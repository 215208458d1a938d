"""`ContextParallel`: attention whose rows live on many ranks, as a plan says."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from contextlib import suppress

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flashcp.comm.choice import TRANSPORTS, Connection, TransportOptions, connect
from flashcp.comm.clock import Clock
from flashcp.comm.errors import ExchangeError
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.comm.exchanges.exchange import AttentionSettings, Exchange
from flashcp.comm.exchanges.heads import Heads
from flashcp.comm.handshake import Header, PendingHeader, Step
from flashcp.comm.transport import Transport
from flashcp.kernels.inputs import check_inputs, default_scale
from flashcp.kernels.interface import AttentionKernel
from flashcp.kernels.selection import ATTENTION, select_attention, waits_inside
from flashcp.kernels.tuning import Tuning, check_tuning
from flashcp.operator import Call, Handle, scale_code
from flashcp.sharding.documents import check_choice
from flashcp.sharding.holders import positions_of_rank
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.route import GRADIENT_WIRES
from flashcp.unshard import local_rows, unshard

__all__ = ["ContextParallel", "Handle"]

OVERLAPS = ("none", "staged", "fused")
TIMEOUT_S, LONGEST_S = 60.0, 1e9  # the default; what clocks and sockets take
_GRACE_S = 5.0  # a rank with an error of its own waits this long for the others to hear of it


class ContextParallel:
    """Context-parallel attention over the ranks of a group.

    group: a torch.distributed group; None: the default one, or this rank alone where none is initialised. A
    `Connection` (`flashcp/comm/choice.py`) that exists already, for ranks inside one process, stands for group,
    transport, timeout_s, head_ranks and options. A mesh of two dims, [holders, head ranks], stands for group and
    head_ranks.
    head_ranks: how many ranks, which follow each other in the group, are one *holder*: a plan gives rows to holders, a
    rank has an even share of its holder's rows, and inside attention all of them for its share of the heads. 1: a
    holder is a rank.
    exchange: `exact`, `compacted`, `all_gather`, `ring`, `ulysses`. overlap: `none` waits for all rows, `staged`
    computes local rows meanwhile and others as they arrive, in `stages` parts, `fused` waits inside its one launch,
    `auto` is `staged`. attention: `auto` or a name of docs/attention.md. transport: `auto`, `shm` between processes of
    one host, the group's backend, `cuda_symmetric` or `nvshmem` (docs/exchange.md); with head_ranks one name for both
    levels, or two, `INSIDE+BETWEEN` holders, such as `shm+gloo`. backward: `keep` holds received KV
    for the backward pass, `refetch` brings it again. gradient_wire: what gradients travel in that are added up,
    `model` (the dtype of q, k and v) or `fp32`; `auto`: fp32 where sums would be rounded on their way again, in a ring
    and where ranks of a holder share a KV head. timeout_s: bound on every wait for another rank. tuning: block
    shapes for the Triton kernels instead of the table's. options: of one-sided transports,
    `flashcp.TransportOptions(heap_mib=..., region_mib=..., throttle_gbps=...)`.

    cp.transport and cp.overlap tell what `auto` chose, cp.transport_reason why; cp.stats is a `Clock` of this rank's
    milliseconds. cp.world_size counts ranks, cp.holders = cp.world_size // cp.head_ranks what plans are made for.
    Raises ValueError for names it does not know and groups this rank is no member of. Calls on all ranks must come
    in the same order. Ranks compare call numbers, plans, exchanges, shapes, dtypes, scales and wires before rows move:
    what differs, and whoever fails or stays away, is named in an ExchangeError on every rank within the time-out. After
    it receive buffers of a one-sided transport are no longer the same on all ranks: every later call raises.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | Connection | None = None,
        exchange: str = "exact",
        overlap: str = "auto",
        attention: str = "auto",
        transport: str = "auto",
        backward: str = "keep",
        timeout_s: float = TIMEOUT_S,
        tuning: Tuning | None = None,
        stages: int = 2,
        options: TransportOptions | None = None,
        head_ranks: int = 1,
        gradient_wire: str = "auto",
    ) -> None:
        for field, name, legal in (
            ("exchange", exchange, tuple(EXCHANGE_CLASSES)),
            ("overlap", overlap, ("auto", *OVERLAPS)),
            ("attention", attention, ("auto", *ATTENTION)),
            ("backward", backward, ("keep", "refetch")),
            ("gradient_wire", gradient_wire, GRADIENT_WIRES),
        ):
            check_choice(field, name, legal)
        if not isinstance(timeout_s, int | float) or not 0.001 <= timeout_s <= LONGEST_S:
            raise ValueError(f"timeout_s={timeout_s!r}: expected seconds from 0.001 to {LONGEST_S:.0e}")
        for one in str(transport).split("+")[:2]:
            if one not in ("auto", "none", *TRANSPORTS):
                check_choice("transport", transport, ("auto", "none", *TRANSPORTS))
        check_tuning(tuning)
        for field, count in (("stages", stages), ("head_ranks", head_ranks)):
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{field}={count!r}: expected a whole number >= 1")
        if not isinstance(options, TransportOptions | None):
            raise ValueError(f"options is a {type(options).__name__}: expected a flashcp.TransportOptions, or None")
        self.exchange = exchange
        self.attention_name, self.tuning = attention, tuning
        self.backward, self.gradient_wire = backward, gradient_wire
        self.stats = Clock()
        if isinstance(group, Connection):
            given = (("transport", transport, "auto"), ("timeout_s", timeout_s, TIMEOUT_S), ("options", options, None),
                     ("head_ranks", head_ranks, 1))  # fmt: skip
            for field, value, unsaid in given:
                if value != unsaid:
                    raise ValueError(f"{field}={value!r}: expected none beside a Connection, which has its own")
        else:
            group = connect(group, transport, timeout_s, options or TransportOptions(), head_ranks)
        self._connection, self.transport = group, group.name
        connection, stats = group, self.stats

        def meet() -> None:
            with stats.measure("wait_ms", "headers"):
                connection.meet()

        self._transport, self._handshake, self.transport_reason, inside = group
        self.holders, self.head_ranks = self._transport.world_size, inside.world_size if inside else 1
        self.world_size = self.holders * self.head_ranks
        self.rank = self._transport.rank * self.head_ranks + (inside.rank if inside else 0)
        self._exchange: Exchange = EXCHANGE_CLASSES[exchange if self.holders > 1 else "exact"](self._transport, meet)
        self.overlap = self._choose_overlap(overlap)
        if inside:
            self._exchange = Heads(inside, self._exchange, meet, backward == "refetch")
        self.stages = stages
        self._calls = 0

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

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, plan: ShardingPlan, softmax_scale: float | None = None
    ) -> Tensor:
        """Causal attention inside each document, over all ranks, differentiable.

        q: [rank's tokens, query heads, head_dim], k and v: [rank's tokens, KV heads, head_dim], rows as `shard` gives
        them; fp32, bf16 or fp16. softmax_scale: 1 / sqrt(head_dim) by default. Returns
        [rank's tokens, query heads, head_dim] in q's dtype. Gradients of K and V rows that other ranks read come
        home as `gradient_wire` says and are added in fp32 in a fixed order.
        Raises ValueError for shapes, dtypes and plans that do not fit, ExchangeError as the class says.
        """
        return self._begin(k, v, plan, q, softmax_scale).attention(q, softmax_scale)

    def prefetch(self, k: Tensor, v: Tensor, plan: ShardingPlan) -> Handle:
        """Let K and V rows leave now; `handle.attention(q)` computes later. Arguments as for `attention`.

        With head ranks the ranks of a holder meet here, so that rows travel on to other holders.
        """
        return self._begin(k, v, plan)

    def shard(self, x: Tensor, plan: ShardingPlan, dim: int = 0) -> Tensor:
        """This rank's rows of a tensor that holds the whole pack along `dim`, in local order."""
        self._check_plan(plan)
        _check_dim("x", x, dim)
        if x.shape[dim] != plan.offsets[-1]:
            raise ValueError(f"x has {x.shape[dim]} rows along dim {dim}: expected the pack's {plan.offsets[-1]}")
        return x.index_select(dim, local_rows(plan, self.rank, self.head_ranks, x.device).here())

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
            return Header(**_codes(plan, local), exchange=-1, row_bytes=row_bytes, gradients=gradients)

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
                self._handshake.stopped = self._handshake.stopped or str(error)
                with suppress(ExchangeError):
                    self._handshake.compare(header._replace(failed=1), _GRACE_S)
            raise
        if self._handshake is not None:
            self._handshake.compare(header._replace(**self._connection.oldest))

    def position_ids(self, plan: ShardingPlan) -> Tensor:
        """Position inside its document of each of this rank's rows, int64 [rank's tokens]."""
        self._check_plan(plan)
        return torch.from_numpy(positions_of_rank(plan, self.rank, self.head_ranks))

    def _begin(
        self, k: Tensor, v: Tensor, plan: ShardingPlan, q: Tensor | None = None, softmax_scale: float | None = None
    ) -> Handle:
        """Let rows leave. q: None where queries come later."""

        def select() -> AttentionKernel:
            return select_attention(self.attention_name, k.device, self.tuning)

        def header() -> Header:
            self._check_plan(plan)
            check_inputs(k if q is None else q, k, v, self._exchange.tokens(plan))
            query_heads, scale = (0, 0.0) if q is None else (q.shape[1], default_scale(q, softmax_scale))
            self._exchange.check(query_heads, k.shape[1])
            select()
            return Header(
                **_codes(plan, k),
                exchange=list(EXCHANGE_CLASSES).index(self.exchange),
                query_heads=query_heads,
                kv_heads=k.shape[1],
                head_dim=k.shape[2],
                scale=scale_code(scale),
                gradients=torch.is_grad_enabled(),
                refetch=self.backward == "refetch",
                gradient_wire=GRADIENT_WIRES.index(self.gradient_wire),
            )

        with self.stats.measure("wait_ms", "headers"):
            agreed, posted = self._agree(header)
        refetch = self.backward == "refetch"
        agree = posted.check if posted else lambda: None  # one rank alone has nobody to agree with
        how = select(), self.overlap, self.stages, refetch, self.gradient_wire, k.shape[1]
        settings = AttentionSettings(*how, self.stats, agree)
        call = Call(plan, self._exchange, settings, agreed, self._connection)
        sending = self.stats.measure("exposed_exchange_ms", f"attention {agreed.call}, send rows")
        with torch.no_grad(), sending, call.watched():
            incoming = self._exchange.start(plan, k, v)
        return Handle(call, incoming, k, v)

    def _agree(self, make_header: Callable[[], Header]) -> tuple[Header, PendingHeader | None]:
        """Check this rank's arguments and tell the others, who also hear of an error here.

        What they tell is compared now, but under a one-sided transport only before this rank reads their rows.
        """
        self._check_together()
        self._calls += 1
        try:
            header = make_header()._replace(call=self._calls, **self._connection.oldest)
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
        """Raise where an earlier error left the ranks with different receive buffers."""
        if self._exchange.puts and self._handshake is not None:
            self._handshake.check_together()

    def _choose_overlap(self, asked: str) -> str:
        """What `auto` stands for. Raises ValueError for `fused` where rows do not arrive source by source, and with a
        kernel that cannot wait for them."""
        if asked == "fused" and not waits_inside(self.attention_name):
            raise ValueError(
                f"overlap='fused' with attention={self.attention_name!r}: expected one of auto, none, staged; other "
                "people's kernels do not wait for rows"
            )
        at_once = self._exchange.moves_later or not self._transport.one_sided
        if asked == "fused" and at_once and self.holders > 1:
            raise ValueError(
                f"overlap='fused' with exchange={self.exchange!r} over {self.transport}: expected one of auto, none, "
                "staged; fused needs a one-sided transport and exact, compacted or all_gather"
            )
        # Not `fused`, even where it could run: a program that waits inside the kernel keeps its SM from other tiles, so
        # it hides a transfer behind the tiles that are ready and one wave more, `staged` behind all local tiles. Which
        # is faster was never measured on a GPU; `python -m flashcp.experiments.campaign overlap` does.
        return "staged" if asked == "auto" else asked

    def _check_plan(self, plan: ShardingPlan) -> None:
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
    if not isinstance(dim, int):
        raise ValueError(f"dim={dim!r}: expected a whole number")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim={dim}: expected an axis of {name}, which has {x.dim()}")


def _codes(plan: ShardingPlan, x: Tensor) -> dict[str, int]:
    """What a header says of both: the fingerprint as an int64, the same number for the same dtype on every rank."""
    fingerprint = int.from_bytes(bytes.fromhex(plan.fingerprint), "big", signed=True)
    return {"plan": fingerprint, "dtype": zlib.crc32(str(x.dtype).encode())}
