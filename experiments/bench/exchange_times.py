"""What the exchange benchmark measures on its ranks: values, gradients and bytes of every variant, which let it by or
not, then how long exchanges take, and how much of that attention hides.

Ranks begin each measurement together, variants take turns, a time is the slowest rank's.
Shapes: T local rows, R rows of the receive buffer, H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from flashcp.comm.choice import TRANSPORTS, TransportOptions
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.context_parallel import OVERLAPS, ContextParallel
from flashcp.experiments.bench.harness import Work, in_turns, relative_error, spread
from flashcp.experiments.sweep.results import Number
from flashcp.kernels.inputs import default_scale
from flashcp.kernels.interface import KV
from flashcp.kernels.reference import reference_attention
from flashcp.kernels.schedule import Schedule
from flashcp.kernels.selection import select_attention
from flashcp.limits import Count, Limit, Natural, Seconds, one_of
from flashcp.schema import read_dataclass
from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.holders import members_heads
from flashcp.sharding.lengths import LENGTH_DATA, windows
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.strategies import plan, strategies
from flashcp.train.ranks import DEVICES, Ranks

DTYPES = {"fp32": (torch.float32, 1e-5), "bf16": (torch.bfloat16, 1e-2)}
"""Legal dtypes, and the largest relative error against float64 that is timed."""
ON_CPU = ("shm", "gloo")
"""Transports of rows in CPU memory; the others move rows in a GPU's."""
SMALL = (1, 60, 300, 129, 20, 2)
"""Documents of the gate."""
AtLeastTwo = Annotated[int, Limit(lambda value: value >= 2, "a whole number >= 2")]


@dataclass
class ExchangeBench:
    """What is exchanged, by what and between whom, as `conf/bench/exchange.yaml` explains it.

    throttle_gbps 0: over `shm` so slow that the rows of `exact` take as long as the local tiles, elsewhere no limit.
    """

    transports: list[str] = field(default_factory=list)
    exchanges: list[str] = field(default_factory=lambda: list(EXCHANGES))
    world_size: AtLeastTwo = 2
    threads: Count = 1
    device: Annotated[str, one_of(DEVICES)] = "auto"
    data_set: Annotated[str, one_of(LENGTH_DATA)] = "redpajama"
    context: AtLeastTwo = 8192
    seed: Natural = 0
    strategy: Annotated[str, one_of(strategies())] = "flashcp"
    query_heads: Count = 8
    kv_heads: Count = 8
    head_dim: Count = 64
    dtype: Annotated[str, one_of(DTYPES)] = "fp32"
    throttle_gbps: Annotated[float, Limit(lambda value: 0 <= value < float("inf"), "a number >= 0")] = 0.0
    seconds: Seconds = 30.0
    timeout_s: Seconds = 60.0

    def check(self) -> None:
        """Raise ValueError, naming value, field and legal values."""
        read_dataclass(ExchangeBench, vars(self))
        for name, legal in (("transports", TRANSPORTS), ("exchanges", tuple(EXCHANGES))):
            for value in getattr(self, name):
                if value not in legal:
                    raise ValueError(f"{name} holds {value!r}: expected {', '.join(legal)}")
        if self.context < self.world_size:
            raise ValueError(f"context={self.context}: expected at least one token a rank, {self.world_size}")
        if self.query_heads % self.kv_heads:
            raise ValueError(f"query_heads={self.query_heads}: expected a multiple of kv_heads={self.kv_heads}")
        for name in self.exchanges:
            if EXCHANGE_CLASSES[name].splits_heads:
                members_heads(self.query_heads, self.kv_heads, self.world_size)

    @property
    def case(self) -> str:
        short = f"{self.context // 1024}K" if self.context % 1024 == 0 else str(self.context)
        heads = f"{self.query_heads}:{self.kv_heads}x{self.head_dim}"
        return f"{self.data_set} {short} N={self.world_size} {self.strategy} {heads} {self.dtype}"

    def sampled(self) -> ShardingPlan:
        return plan(next(windows(self.data_set, self.context, 1, self.seed)), self.world_size, self.strategy)

    def small(self) -> ShardingPlan:
        """The plan of the gate's pack."""
        return plan(SMALL, self.world_size, self.strategy)


@dataclass(frozen=True, eq=False)
class Problem:
    """A plan and random tensors of this rank."""

    bench: ExchangeBench
    plan: ShardingPlan
    ranks: Ranks

    @cached_property
    def local(self) -> list[Tensor]:
        """q, k, v of this rank's rows and the gradient of their output, [T, heads, D]."""
        return self.draw(int(self.plan.tokens[self.ranks.rank]), self.bench.seed + 1 + self.ranks.rank)

    @property
    def kv(self) -> tuple[ShardingPlan, Tensor, Tensor]:
        """What an exchange starts with: the plan, this rank's keys and values."""
        return self.plan, self.local[1], self.local[2]

    def draw(self, rows: int, seed: int) -> list[Tensor]:
        """q, k, v and a gradient of the output, [rows, heads, D], the same for a seed on every rank."""
        random = torch.Generator().manual_seed(seed)
        heads = (self.bench.query_heads, self.bench.kv_heads, self.bench.kv_heads, self.bench.query_heads)
        drawn = (torch.randn(rows, count, self.bench.head_dim, generator=random) for count in heads)
        return [x.to(self.ranks.device, DTYPES[self.bench.dtype][0]) for x in drawn]


def offered(bench: ExchangeBench, device: torch.device) -> dict[str, str]:
    """The transports that are asked for, or all that this group of ranks has, and for those it has not, why.

    Raises what its operator raises for one that was asked for and is not there. All ranks call this.
    """
    found = {}
    for transport in bench.transports or [name for name in TRANSPORTS if (name in ON_CPU) == (device.type == "cpu")]:
        found[transport] = ""
        try:
            if (transport in ON_CPU) != (device.type == "cpu"):
                raise ValueError(f"transport={transport!r} with device={device.type}: it moves rows of another device")
            operator(bench, transport, "exact")
        except (ValueError, RuntimeError, ImportError) as error:
            if bench.transports:
                raise
            found[transport] = str(error)
    return found


def operator(
    bench: ExchangeBench, transport: str, exchange: str, overlap: str = "none", throttle_gbps: float = 0.0
) -> ContextParallel:
    """The operator of one variant. Raises ValueError where the ranks have no such thing; all ranks call this."""
    options = TransportOptions(throttle_gbps=throttle_gbps)
    return ContextParallel(None, exchange, overlap, transport=transport, timeout_s=bench.timeout_s, options=options)


def overlaps_of(bench: ExchangeBench, transport: str, exchange: str) -> list[str]:
    """Levels of overlap that a transport and an exchange have: `ulysses` waits for rows at every level."""
    if EXCHANGE_CLASSES[exchange].splits_heads:
        return ["none"]
    found = []
    for overlap in OVERLAPS:
        with suppress(ValueError):
            operator(bench, transport, exchange, overlap)
            found.append(overlap)
    return found


def check(cp: ContextParallel, small: Problem) -> None:
    """The gate: output, gradients and bytes of a small pack. Raises RuntimeError on all ranks when one is wrong."""
    *leaves, grad = small.draw(int(small.plan.offsets[-1]), small.bench.seed)
    found, _ = both_ways(cp, small, [cp.shard(x, small.plan) for x in (*leaves, grad)])
    q, k, v = (x.requires_grad_() for x in leaves)
    reference = reference_attention(q, k, v, small.plan.document_lengths.tolist())
    wanted = [reference, *torch.autograd.grad(reference, leaves, grad.double())]
    error = max(relative_error(a, cp.shard(b, small.plan)) for a, b in zip(found, wanted, strict=True))
    worst, limit = small.ranks.max(error)[0], DTYPES[small.bench.dtype][1]
    if not worst <= limit:
        what = f"{cp.transport}/{cp.exchange}, overlap {cp.overlap}"
        raise RuntimeError(f"{what}: relative error {worst:.1e}: an exchange that is wrong is not timed")


def both_ways(cp: ContextParallel, problem: Problem, rows: Sequence[Tensor]) -> tuple[list[Tensor], tuple[int, int]]:
    """Attention of this rank's rows forward and backward, its bytes counted.

    rows: q, k, v and the gradient of the output. Returns output and gradients; what left the busiest rank in each pass.
    Raises RuntimeError on all ranks where the bytes are not the route's.
    """
    q, k, v = leaves = [x.clone().requires_grad_() for x in rows[:3]]
    sent = [cp.sent_bytes]
    out = cp.attention(q, k, v, problem.plan)
    sent.append(cp.sent_bytes)
    results = [out, *torch.autograd.grad(out, leaves, rows[3])]
    sent.append(cp.sent_bytes)
    bench, route = problem.bench, problem.plan.route(cp.exchange)
    shape = bench.query_heads, bench.kv_heads, bench.head_dim, DTYPES[bench.dtype][0].itemsize
    forward, backward = route.bytes(*shape), route.bytes(*shape, True, cp.gradient_wire)
    found, wanted = np.diff(sent).tolist(), [int(forward[cp.rank]), int(backward[cp.rank])]
    if problem.ranks.max(found != wanted)[0]:
        raise RuntimeError(
            f"{cp.transport}/{cp.exchange}: rank {cp.rank} sent {found[0]} and {found[1]} bytes, the route says "
            f"{wanted[0]} and {wanted[1]}"
        )
    return results, (int(forward.max()), int(backward.max()))


def measure(bench: ExchangeBench, ranks: Ranks, say: Callable[[str], None]) -> Iterator[Number]:
    """Check every variant, then count bytes, then time. All ranks call this and get the same numbers.

    sent_bytes, sent_backward_bytes: that leave the busiest rank. latency_us: of one row a rank. exchange_ms: from the
    start until the sampled plan's rows are there and have left, nothing computed meanwhile (of `ulysses` K and V).
    bandwidth_gbps: bytes of that from the busiest rank over exchange_ms. The rest is about hiding (`hiding`). Providers
    are transport/exchange. Raises RuntimeError for a wrong result or wrong bytes, ValueError where nothing is there to
    measure.
    """
    there = offered(bench, ranks.device)
    for transport, why in there.items():
        if why:
            say(f"{transport}: left out: {why}")
    pairs = {f"{x}/{exchange}": (x, exchange) for x, why in there.items() if not why for exchange in bench.exchanges}
    levels = {name: overlaps_of(bench, *pair) for name, pair in pairs.items()}
    if not levels:
        raise ValueError(f"transports={bench.transports}: expected some that a group on {ranks.device.type} has")
    one_row = plan([bench.world_size], bench.world_size, "contiguous")  # a rank
    small, full, least = (Problem(bench, made, ranks) for made in (bench.small(), bench.sampled(), one_row))
    for name, found in levels.items():
        for overlap in found:
            check(operator(bench, *pairs[name], overlap), small)
        say(f"{name}: right at overlap {', '.join(found)}")
    plain = {name: operator(bench, *pair) for name, pair in pairs.items()}
    for name, cp in plain.items():
        _, moved = both_ways(cp, full, full.local)
        for metric, count in zip(("sent_bytes", "sent_backward_bytes"), moved, strict=True):
            yield Number(name, metric, "bytes", None, count, None)
    say("bytes are the routes'; timing the exchanges alone")
    short = {name: partial(exchanged, cp, *least.kv) for name, cp in plain.items()}
    for name, times in in_turns(short, ranks, bench.seconds).items():
        yield Number(name, "latency_us", "us", *spread(1e3 * ranks_max(ranks, times)))
    before = {name: cp.sent_bytes for name, cp in plain.items()}
    whole = {name: partial(exchanged, cp, *full.kv) for name, cp in plain.items()}
    for name, times in in_turns(whole, ranks, bench.seconds).items():
        slowest = ranks_max(ranks, times)
        moved_bytes = ranks.max((plain[name].sent_bytes - before[name]) / (1 + len(times)))[0]  # one warmed up
        yield Number(name, "exchange_ms", "ms", *spread(slowest))
        yield Number(name, "bandwidth_gbps", "GB/s", *spread(moved_bytes / slowest / 1e6))
    say("timing attention with the exchange")
    yield from hiding(bench, full, plain, {name: found for name, found in levels.items() if len(found) > 1})


def hiding(
    bench: ExchangeBench, full: Problem, plain: Mapping[str, ContextParallel], levels: Mapping[str, Sequence[str]]
) -> Iterator[Number]:
    """What is exposed of each exchange beside the attention of the same rows, forward.

    compute_ms: attention with all rows there. exposed_*_ms: the operator's time beyond that, round by round on each
    rank, the largest of all ranks. hidden_*: 1 - exposed / exposed at overlap none; not given where even overlap none
    exposes less than compute_ms varies. throttle_gbps: what the rows were slowed down to, if they were.
    """
    ranks, work, throttles = full.ranks, {}, {}
    slowed = bench.throttle_gbps or _as_slow_as_local_tiles(bench, full, plain)
    q, k, v, _ = full.local
    for name, found in levels.items():
        throttles[name] = slowed if bench.throttle_gbps or name.startswith("shm/") else 0.0
        received = exchanged(plain[name], *full.kv, Tensor.clone).unbind(1)  # there before it begins
        work[name, "compute"] = attend(full, plain[name]._exchange.layout(full.plan).schedule, *received)
        for overlap in found:
            cp = operator(bench, plain[name].transport, plain[name].exchange, overlap, throttles[name])
            work[name, overlap] = torch.no_grad()(partial(cp.attention, q, k, v, full.plan))
    times = in_turns(work, ranks, bench.seconds)
    for name, found in levels.items():
        compute = times[name, "compute"]
        p20, median, p80 = spread(ranks_max(ranks, compute))
        yield Number(name, "compute_ms", "ms", p20, median, p80)
        exposed = {overlap: ranks_max(ranks, times[name, overlap] - compute) for overlap in found}
        for overlap in found:
            yield Number(name, f"exposed_{overlap}_ms", "ms", *spread(exposed[overlap]))
        if throttles[name]:
            yield Number(name, "throttle_gbps", "GB/s", None, throttles[name], None)
        if spread(exposed["none"])[0] > p80 - p20:
            for overlap in found[1:]:
                yield Number(name, f"hidden_{overlap}", "share", *spread(1 - exposed[overlap] / exposed["none"]))


def _as_slow_as_local_tiles(bench: ExchangeBench, full: Problem, plain: Mapping[str, ContextParallel]) -> float:
    """GB/s at which the rows of `exact` take as long as the local tiles, on the busiest ranks; 0 without such rows."""
    cp = next(iter(plain.values()))
    local = attend(full, cp._exchange.layout(full.plan).local_schedule, full.local[1][:0], full.local[2][:0])
    times = in_turns({"local": local}, full.ranks, bench.seconds / 4)["local"]
    ms = spread(ranks_max(full.ranks, times))[1]
    size = full.local[1].element_size()
    moved = full.plan.route("exact").bytes(bench.query_heads, bench.kv_heads, bench.head_dim, size).max()
    return float(moved) / ms / 1e6


def exchanged(
    cp: ContextParallel, plan: ShardingPlan, k: Tensor, v: Tensor, take: Callable[[Tensor], Any] = lambda rows: None
) -> Any:
    """The exchange alone: from its start until all rows are there and this rank's have left.

    Returns what `take` makes of the receive buffer, [R, 2, K, D].
    """
    incoming = cp._exchange.start(plan, k, v)
    incoming.transfer.finish()
    found = take(incoming.inbox.rows)
    cp._exchange.transport.free(incoming.inbox.ticket)
    return found


def attend(problem: Problem, schedule: Schedule, k: Tensor, v: Tensor) -> Work:
    """Attention of this rank's rows over a schedule, k and v the receive buffer."""
    queries, keys, values, _ = problem.local
    kernel = select_attention("auto", queries.device)
    scale = default_scale(queries, None)
    return torch.no_grad()(lambda: kernel.attend(queries, KV(keys, values), KV(k, v), schedule, scale))


def ranks_max(ranks: Ranks, values: np.ndarray) -> np.ndarray:
    """The largest of all ranks, round by round."""
    return np.array(ranks.max(*values.tolist()))
