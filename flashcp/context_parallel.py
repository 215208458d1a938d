"""`ContextParallel`: attention whose rows live on many ranks, as a plan says."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from flashcp.call import Begun, Call, Layer, Queries, query_codes, versions
from flashcp.comm.choice import TRANSPORTS, Connection, TransportOptions, connect
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.comm.exchanges.exchange import AttentionSettings
from flashcp.comm.header import RESHARD, Header, exchange_code, wire_code
from flashcp.gather import Gathering, Pairs, attend, check_pairs, check_receives
from flashcp.handle import Handle, autocast, run
from flashcp.joined_ranks import JoinedRanks, check_rows, header_codes
from flashcp.kernels.inputs import check_inputs, check_return_lse
from flashcp.kernels.interface import AttentionKernel
from flashcp.kernels.scores import Scores, read_scores
from flashcp.kernels.selection import ATTENTION, select_attention, waits_inside
from flashcp.kernels.tuning import Tuning, check_tuning
from flashcp.operator import prefetch
from flashcp.reshard import Resharding
from flashcp.sharding.documents import MOST_RANKS, MOST_TOKENS
from flashcp.sharding.numbered import number_of
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.reshard import check_same_pack
from flashcp.sharding.route import GRADIENT_WIRES
from flashcp.sharding.values import check_choice, read_number, read_whole, shown
from flashcp.untraced import untraced
from flashcp.version import __version__

__all__ = ["ContextParallel", "Handle"]

OVERLAPS = ("none", "staged", "fused")
TIMEOUT_S, LONGEST_S = 60.0, 1e9  # the default; what clocks and sockets take


class ContextParallel(JoinedRanks):
    """Context-parallel attention over the ranks of a group.

    group: a torch.distributed group or a DeviceMesh of one dim; None: the default group, or this rank alone where none
    is initialised. A mesh of two dims, [holders, head ranks], stands for group and head_ranks. A `Connection`
    (`flashcp/comm/choice.py`) that exists already, for ranks inside one process, stands for group, transport,
    timeout_s, head_ranks and options.
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
    `flashcp.TransportOptions(heap_mib=..., region_mib=..., throttle_gbps=...)`. verify_rows: checksums travel beside
    rows and gradients, over `shm` and gloo; a rank that receives others than were sent raises an ExchangeError.

    cp.transport and cp.overlap tell what `auto` chose, cp.transport_reason why; cp.stats is a `Clock` of this rank's
    milliseconds. cp.world_size counts ranks, cp.holders = cp.world_size // cp.head_ranks what plans are made for.
    `close`, or the end of a `with` block, ends it.
    Raises ValueError for names it does not know, groups this rank is no member of, and on all ranks for settings and
    versions of flashcp that differ between them; ExchangeError for a group that a time-out ended. Calls on all ranks
    must come in the same order. Ranks compare call numbers, plans, exchanges, shapes, dtypes, scales and wires before
    rows move: what differs, and whoever fails or stays away, is named in an ExchangeError on every rank within the
    time-out. After it receive buffers of a one-sided transport are no longer the same on all ranks: every later call
    raises, and says whether a new ContextParallel helps. After a time-out only a new process group does: gloo, which
    headers go over under every transport, closes its connections then.
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
        verify_rows: bool = False,
    ) -> None:
        for field, name, legal in (
            ("exchange", exchange, tuple(EXCHANGE_CLASSES)),
            ("overlap", overlap, ("auto", *OVERLAPS)),
            ("attention", attention, ("auto", *ATTENTION)),
            ("backward", backward, ("keep", "refetch")),
            ("gradient_wire", gradient_wire, GRADIENT_WIRES),
        ):
            check_choice(field, name, legal)
        legal_s = f"seconds from 0.001 to {LONGEST_S:.0e}"
        wait_s = read_number("timeout_s", timeout_s, lambda number: 0.001 <= number <= LONGEST_S, legal_s)
        transports = ("auto", "none", *TRANSPORTS)
        if not isinstance(transport, str) or not set(transport.split("+")[:2]) <= set(transports):
            check_choice("transport", transport, transports)
        check_tuning(tuning)
        stages, head_ranks = read_whole("stages", stages), read_whole("head_ranks", head_ranks, most=MOST_RANKS)
        if not isinstance(verify_rows, bool):
            raise ValueError(f"verify_rows={shown(verify_rows)}: expected True or False")
        if not isinstance(options, TransportOptions | None):
            raise ValueError(f"options is a {type(options).__name__}: expected a flashcp.TransportOptions, or None")
        self.exchange, self._group = exchange, group
        self.attention_name, self.tuning = attention, tuning
        self.backward, self.gradient_wire = backward, gradient_wire
        if isinstance(group, Connection):
            given = (("transport", transport, "auto"), ("timeout_s", timeout_s, TIMEOUT_S), ("options", options, None),
                     ("head_ranks", head_ranks, 1), ("verify_rows", verify_rows, False))  # fmt: skip
            for field, value, unsaid in given:
                if value != unsaid:
                    raise ValueError(f"{field}={shown(value)}: expected none beside a Connection, which has its own")
        else:
            how = options or TransportOptions(), head_ranks, verify_rows, __version__
            group = connect(group, transport, wait_s, *how)
        super().__init__(group, exchange, backward == "refetch", verify_rows)
        self._number = torch.from_numpy(number_of(self))
        self.overlap = self._choose_overlap(overlap)
        self.stages = stages

    @overload
    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, plan: ShardingPlan, softmax_scale: float | None = None, *,
        window: int | None = None, chunk: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
        return_lse: Literal[False] = False,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, plan: ShardingPlan, softmax_scale: float | None = None, *,
        window: int | None = None, chunk: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
        return_lse: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip
    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: ShardingPlan,
        softmax_scale: float | None = None,
        *,
        window: int | None = None,
        chunk: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention inside each document, under the plan's masks, over all ranks, differentiable.

        q: [rank's tokens, query heads, head_dim], k and v: [rank's tokens, KV heads, head_dim], rows as `shard` gives
        them; fp32, bf16 or fp16. softmax_scale: 1 / sqrt(head_dim) by default. window, chunk: this layer sees no more
        of the past than so many keys, or than its chunk; only rows that it reads travel. softcap: scores become
        softcap * tanh(score / softcap). sinks: [query heads], a logit more in the softmax of each row; its gradient is
        of this rank's rows (with head ranks: heads), to be summed over ranks as any parameter's.
        Returns [rank's tokens, query heads, head_dim] in q's dtype, with return_lse also the log-sum-exp, fp32 [rank's
        tokens, query heads], sinks counted; it has no gradient, and a backward that brings one raises RuntimeError.
        Gradients of K and V rows that other ranks read come home as `gradient_wire` says and are added in fp32 in a
        fixed order.
        Raises ValueError for shapes, dtypes and plans that do not fit, ExchangeError as the class says.
        """

        q, k, v = autocast(q, k, v)

        def queries() -> Queries:
            check_inputs(q, k, v)
            return Queries(q, read_scores(q, softmax_scale, softcap, sinks), return_lse)

        layer = self._hand_over(k, v, plan, window, chunk, queries)
        scores = read_scores(q, softmax_scale, softcap, sinks)
        return run(q, k, v, scores, None, self._number, torch.from_numpy(plan.number), layer, return_lse)

    def prefetch(
        self, k: Tensor, v: Tensor, plan: ShardingPlan, *, window: int | None = None, chunk: int | None = None
    ) -> Handle:
        """Let K and V rows leave now; `handle.attention(q, softmax_scale, softcap=, sinks=, return_lse=)` computes
        later. Arguments as for `attention`.

        With head ranks the ranks of a holder meet here, so that rows travel on to other holders.
        """
        k, v = autocast(k, v)
        layer = self._hand_over(k, v, plan, window, chunk)
        of_plan = torch.from_numpy(plan.number)
        begun = prefetch(k, v, self._number, of_plan, layer.window, layer.chunk, torch.is_grad_enabled())
        return Handle(begun, k, v, self._number, of_plan, layer)

    def gather(self, x: Tensor, plan: ShardingPlan, *, window: int | None = None, chunk: int | None = None) -> Tensor:
        """The rows that this rank's queries read and others hold, [rows, ...] in the order of the receive buffer.

        x: this rank's rows [rank's tokens, ...], floating, any shape of a row: a latent, or KV that several layers
        share. Over every exchange that brings rows to ranks. Differentiable: gradients return to the rows' owners as
        `gradient_wire` says and are added in fp32. window, chunk: as for `attention`.
        Raises as `attention` does, and ValueError for `ulysses` and head ranks.
        """
        return self.prefetch_gather(x, plan, window=window, chunk=chunk).rows()

    @untraced
    def prefetch_gather(
        self, x: Tensor, plan: ShardingPlan, *, window: int | None = None, chunk: int | None = None
    ) -> Gathering:
        """Let the rows of `gather` leave now; `.rows()` of what is returned waits for those that come."""

        def header() -> Header:
            self._check_plan(plan)
            check_receives(self._exchange)
            check_rows("x", x, self._exchange.tokens(plan), self.rank)
            if not x.dtype.is_floating_point:
                raise ValueError(f"x is {x.dtype}: expected a floating-point dtype")
            return Header(
                **header_codes(plan.narrow(window, chunk), x),
                exchange=exchange_code(self.exchange),
                row_bytes=math.prod(x.shape[1:]) * x.element_size(),
                gradients=torch.is_grad_enabled() and x.requires_grad,
                gradient_wire=wire_code(self.gradient_wire),
                kv_heads=1,
                gathers=1,
            )

        call = self._call(header, x, plan, window, chunk)
        with torch.no_grad(), call.watched():
            return Gathering(call, x)

    @overload
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, received_k: Tensor, received_v: Tensor, plan: ShardingPlan,
        softmax_scale: float | None = None, *, window: int | None = None, chunk: int | None = None,
        softcap: float | None = None, sinks: Tensor | None = None, return_lse: Literal[False] = False,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, received_k: Tensor, received_v: Tensor, plan: ShardingPlan,
        softmax_scale: float | None = None, *, window: int | None = None, chunk: int | None = None,
        softcap: float | None = None, sinks: Tensor | None = None, return_lse: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip
    @untraced
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        received_k: Tensor,
        received_v: Tensor,
        plan: ShardingPlan,
        softmax_scale: float | None = None,
        *,
        window: int | None = None,
        chunk: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention over rows that are here; nobody is spoken to.

        q, k, v: as for `attention`, but values may have a head_dim of their own. received_k, received_v: [rows, KV
        heads, head_dim] each, made from rows as `gather` gives them, for the same window and chunk. Differentiable in
        all five and in the sinks. The other arguments, what is returned and raised: as for `attention`.
        """
        self._check_plan(plan)
        check_return_lse(return_lse)
        exchange = check_receives(self._exchange)
        tensors = Pairs(q, k, v, received_k, received_v)
        check_pairs(tensors, exchange.tokens(plan))
        layout = exchange.layout(plan.narrow(window, chunk))
        if len(received_k) < (rows := layout.schedule.extent[2]):
            raise ValueError(f"received_k has {len(received_k)} rows: expected {rows}, as gather gives them")
        kernel = select_attention(self.attention_name, q.device, self.tuning)
        out, lse = attend(tensors, kernel, layout.schedule, read_scores(q, softmax_scale, softcap, sinks), self.stats)
        return (out, lse) if return_lse else out

    def reshard(self, x: Tensor, before: ShardingPlan, after: ShardingPlan) -> Tensor:
        """This rank's rows under plan `after`, from its rows x [rank's tokens, ...] under plan `before`.

        Only rows whose rank changes travel. The plans may cut other documents out of the same tokens: a plan of one
        document of all tokens with `contiguous` gives linear attention the order of the pack. Differentiable.
        Raises ValueError for plans of other tokens or ranks, 8-bit floats and head ranks, ExchangeError as the class
        says.
        """
        return self.prefetch_reshard(x, before, after).rows()

    @untraced
    def prefetch_reshard(self, x: Tensor, before: ShardingPlan, after: ShardingPlan) -> Resharding:
        """Let the rows of `reshard` leave now; `.rows()` of what is returned waits for those that come."""

        def header() -> Header:
            for plan in (before, after):
                self._check_plan(plan)
            if self.head_ranks > 1:
                raise ValueError(f"reshard with head_ranks={self.head_ranks}: expected 1")
            check_rows("x", x, int(before.tokens[self.rank]), self.rank)
            if x.dtype.is_floating_point and x.dtype.itemsize < 2:  # torch indexes none of these
                raise ValueError(f"x is {x.dtype}: expected numbers of 16 bits or more, or whole ones")
            check_same_pack(before, after)
            codes = header_codes(before, x)
            codes["plan"] ^= header_codes(after, x)["plan"] >> 1
            return Header(**codes, exchange=RESHARD, row_bytes=math.prod(x.shape[1:]) * x.element_size(),
                          gradients=torch.is_grad_enabled() and x.requires_grad)  # fmt: skip

        agreed, posted = self._agree(header)
        if posted is not None:
            posted.check()
        return Resharding(x, before, after, self._connection, agreed)

    def __repr__(self) -> str:
        closed = ", closed" if self._closed else ""
        return (
            f"ContextParallel(rank {self.rank} of {self.world_size}, head_ranks={self.head_ranks}, "
            f"exchange={self.exchange}, transport={self.transport}, overlap={self.overlap}, "
            f"attention={self.attention_name}{closed})"
        )

    def prepare(self, model: nn.Module) -> None:
        """Let DistributedDataParallel and fully_shard (FSDP2) inside the model sum gradients, over any backend.

        Both average unless told otherwise, and a rank's loss is here its own rows' part of a loss. Gradients are summed
        over all ranks of the wrapper, those of other replicas too: divide each rank's loss by the labels of all packs
        of the step, of every replica. Raises ValueError for a model without such modules, and for FSDP1.
        """
        from flashcp.gradients import prepare  # FSDP takes half as long to import as torch

        prepare(model)

    def sum_gradients(self, model: nn.Module) -> None:
        """Add up the gradients of all ranks that share packs: once a step, after the last backward, on all ranks.

        For parameters that no DistributedDataParallel or fully_shard over these ranks reduces; those of a wrapper over
        ranks of other replicas are summed here too. A gradient that some ranks have and others do not counts as zero
        there: all have it afterwards. Synchronizes first. Takes gradients in buckets, in the order of the parameters,
        and adds in fp32 or wider. Raises ValueError for a wrapper that still averages (see `prepare`), one over a part
        of these ranks, and sparse gradients; ExchangeError as the class says.
        """
        if isinstance(self._group, Connection):
            raise ValueError("sum_gradients over a Connection: expected a ContextParallel over a group")
        from flashcp.gradients import sum_gradients

        self.synchronize()
        sum_gradients(model, self._group)

    def begin(
        self,
        k: Tensor,
        v: Tensor,
        plan: ShardingPlan,
        window: int | None,
        chunk: int | None,
        gradients: bool,
        queries: Queries | None,
    ) -> Begun:
        """Agree with the other ranks and let rows leave; the operators call this. queries: None where they come
        later."""
        header = partial(self._header, k, v, plan, window, chunk, gradients, lambda: queries)
        call = self._call(header, k, plan, window, chunk)
        sending = self.stats.measure("exposed_exchange_ms", f"attention {call.header.call}, send rows")
        with torch.no_grad(), sending, call.watched():
            incoming = self._exchange.start(call.plan, k, v)
        return Begun(call, incoming, k, v, versions(k, v))

    def _hand_over(
        self,
        k: Tensor,
        v: Tensor,
        plan: ShardingPlan,
        window: int | None,
        chunk: int | None,
        queries: Callable[[], Queries | None] = lambda: None,
    ) -> Layer:
        """The layer as operators take it. What no operator can be handed is refused before, on all ranks; compiled
        code has no such arguments."""
        if not torch.compiler.is_compiling():  # the operator makes the header again: nothing but tensors reaches it
            header = partial(self._header, k, v, plan, window, chunk, torch.is_grad_enabled(), queries)
            try:
                header()
            except Exception:
                self._agree(header)
                raise
        far, wide = (None if size is None else min(int(size), MOST_TOKENS) for size in (window, chunk))
        return Layer(far, wide, self._exchange.inputs_wait)

    def _header(
        self,
        k: Tensor,
        v: Tensor,
        plan: ShardingPlan,
        window: int | None,
        chunk: int | None,
        gradients: bool,
        read_queries: Callable[[], Queries | None],
    ) -> Header:
        """What this rank tells the others of a call, whose arguments it checks."""
        self._check_plan(plan)
        queries, narrow = read_queries(), plan.narrow(window, chunk)
        check_inputs(k if queries is None else queries.q, k, v, self._exchange.tokens(plan))
        of_queries = {"query_heads": 0} if queries is None else query_codes(queries)
        self._exchange.check(of_queries["query_heads"], k.shape[1])
        self._kernel(k).check_masks(narrow.masks)
        return Header(
            **header_codes(narrow, k),
            **of_queries,
            exchange=exchange_code(self.exchange),
            kv_heads=k.shape[1],
            head_dim=k.shape[2],
            gradients=gradients,
            refetch=self.backward == "refetch",
            gradient_wire=wire_code(self.gradient_wire),
        )

    def _call(
        self, header: Callable[[], Header], rows: Tensor, plan: ShardingPlan, window: int | None, chunk: int | None
    ) -> Call:
        """A call that all ranks agree on. header: checks the arguments, which are not looked at before."""

        def checked() -> Header:
            made = header()
            self._kernel(rows)
            return made

        with self.stats.measure("wait_ms", "headers"):
            agreed, posted = self._agree(checked)
        refetch = self.backward == "refetch"
        agree = posted.check if posted else lambda: None  # one rank alone has nobody to agree with
        how = self._kernel(rows), self.overlap, self.stages, refetch, self.gradient_wire, agreed.kv_heads
        settings = AttentionSettings(*how, self.stats, agree, Scores(1.0))
        return Call(plan.narrow(window, chunk), self._exchange, settings, agreed, self._connection)

    def _kernel(self, rows: Tensor) -> AttentionKernel:
        return select_attention(self.attention_name, rows.device, self.tuning)

    def _choose_overlap(self, asked: str) -> str:
        """What `auto` stands for. Raises ValueError for `fused` where rows do not arrive source by source, and with a
        kernel that cannot wait for them."""
        if asked == "fused" and not waits_inside(self.attention_name):
            raise ValueError(
                f"overlap='fused' with attention={self.attention_name!r}: expected one of auto, none, staged; other "
                "people's kernels do not wait for rows"
            )
        at_once = self._between.moves_later or not self._transport.one_sided
        if asked == "fused" and at_once and self.holders > 1:
            raise ValueError(
                f"overlap='fused' with exchange={self.exchange!r} over {self.transport}: expected one of auto, none, "
                "staged; fused needs a one-sided transport and exact, compacted or all_gather"
            )
        # Not `fused`, even where it could run: a program that waits inside the kernel keeps its SM from other tiles, so
        # it hides a transfer behind the tiles that are ready and one wave more, `staged` behind all local tiles. Which
        # is faster was never measured on a GPU; `python -m flashcp.experiments.campaign overlap` does.
        return "staged" if asked == "auto" else asked
