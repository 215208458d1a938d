"""What the exchange benchmark runs on, and the gate before it: values, gradients and bytes of every variant.

Shapes: T local rows, R rows of the receive buffer, H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from flashcp.comm.choice import TRANSPORTS, TransportOptions
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.context_parallel import OVERLAPS, ContextParallel
from flashcp.experiments.bench.harness import relative_error
from flashcp.kernels.reference import reference_attention
from flashcp.limits import Count, Limit, Natural, Seconds, one_of
from flashcp.schema import read_dataclass
from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.lengths import LENGTH_DATA, windows
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.strategies import plan, strategies
from flashcp.train.ranks import DEVICES, Ranks

__all__ = ["ExchangeBench", "Problem", "both_ways", "check", "offered", "operator", "overlaps_of"]

DTYPES = {"fp32": (torch.float32, 1e-5), "bf16": (torch.bfloat16, 1e-2)}
"""Legal dtypes, and the largest relative error against float64 that is timed."""
ON_CPU = ("shm", "gloo")
"""Transports of rows in CPU memory; the others move rows in a GPU's."""
SMALL = (1, 60, 300, 129, 20, 2)
"""Documents of the gate."""
AtLeastTwo = Annotated[int, Limit(lambda value: value >= 2, "a whole number >= 2")]
Rate = Annotated[float, Limit(lambda value: 0 <= value < math.inf, "a number >= 0")]


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
    throttle_gbps: Rate = 0.0
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
            if EXCHANGE_CLASSES[name].splits_heads and self.kv_heads % self.world_size:
                raise ValueError(
                    f"kv_heads={self.kv_heads} with exchange {name!r}: expected a multiple of "
                    f"world_size={self.world_size}, or exchanges without it"
                )

    @property
    def case(self) -> str:
        """The work in short."""
        short = f"{self.context // 1024}K" if self.context % 1024 == 0 else str(self.context)
        heads = f"{self.query_heads}:{self.kv_heads}x{self.head_dim}"
        return f"{self.data_set} {short} N={self.world_size} {self.strategy} {heads} {self.dtype}"

    def sampled(self) -> ShardingPlan:
        """The plan of the pack that is exchanged."""
        return plan(next(windows(self.data_set, self.context, 1, self.seed)), self.world_size, self.strategy)

    def small(self) -> ShardingPlan:
        """The plan of the gate's pack."""
        return plan(SMALL, self.world_size, self.strategy)

    def one_row(self) -> ShardingPlan:
        """A document of one row a rank: the smallest exchange in which all ranks take part."""
        return plan([self.world_size], self.world_size, "contiguous")


@dataclass(frozen=True, eq=False)
class Problem:
    """A plan and random tensors of this rank. The whole pack is made only for the gate."""

    bench: ExchangeBench
    plan: ShardingPlan
    ranks: Ranks

    @cached_property
    def whole(self) -> list[Tensor]:
        """q, k, v of the whole pack and the gradient of its output, [tokens, heads, D], the same on every rank."""
        return self._draw(int(self.plan.offsets[-1]), self.bench.seed)

    @cached_property
    def local(self) -> list[Tensor]:
        """The same of this rank's rows alone, [T, heads, D]."""
        return self._draw(int(self.plan.tokens[self.ranks.rank]), self.bench.seed + 1 + self.ranks.rank)

    @property
    def kv(self) -> tuple[ShardingPlan, Tensor, Tensor]:
        """What an exchange starts with: the plan, this rank's keys and values."""
        return self.plan, self.local[1], self.local[2]

    def _draw(self, rows: int, seed: int) -> list[Tensor]:
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
    q, k, v = leaves = [x.detach().requires_grad_() for x in small.whole[:3]]
    reference = reference_attention(q, k, v, small.plan.document_lengths.tolist())
    wanted = [reference, *torch.autograd.grad(reference, leaves, small.whole[3].double())]
    found, _ = both_ways(cp, small, [cp.shard(x, small.plan) for x in small.whole])
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
    bench, exchange = problem.bench, EXCHANGE_CLASSES[cp.exchange]
    route, model = problem.plan.route(cp.exchange), DTYPES[bench.dtype][0]
    heads = bench.query_heads, bench.kv_heads, bench.head_dim
    forward = route.bytes(*heads, model.itemsize)
    backward = route.bytes(*heads, (exchange.gradient_dtype or model).itemsize, backward=True)
    found, wanted = np.diff(sent).tolist(), [int(forward[cp.rank]), int(backward[cp.rank])]
    if problem.ranks.max(found != wanted)[0]:
        raise RuntimeError(
            f"{cp.transport}/{cp.exchange}: rank {cp.rank} sent {found[0]} and {found[1]} bytes, the route says "
            f"{wanted[0]} and {wanted[1]}"
        )
    return results, (int(forward.max()), int(backward.max()))
