"""What the exchange benchmark runs on, and the gate before it: values, gradients and bytes of every variant.

Shapes: T local rows, R rows of the receive buffer, H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from flashcp.comm.choice import TRANSPORTS, TransportOptions
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.context_parallel import OVERLAPS, ContextParallel
from flashcp.experiments.bench.accuracy import relative_error
from flashcp.kernels.reference import reference_attention
from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.lengths import LENGTH_DATA, windows
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.strategies import plan, strategies
from flashcp.train.ranks import DEVICES, LONGEST_WAIT_S, Ranks

__all__ = ["ExchangeBench", "Problem", "check", "check_bytes", "offered", "operator", "overlaps_of"]

DTYPES = {"fp32": (torch.float32, 1e-5), "bf16": (torch.bfloat16, 1e-2)}
"""Legal dtypes, and the largest relative error against float64 that is timed."""
ON_CPU = ("shm", "gloo")
"""Transports of rows in CPU memory; the others move rows in a GPU's."""
SMALL = (1, 60, 300, 129, 20, 2)
"""Documents of the gate."""


@dataclass
class ExchangeBench:
    """transports: names that `flashcp.ContextParallel` takes; empty: all that the ranks have on this device.

    data_set, context, seed, strategy: of the pack that is exchanged, and its plan. world_size, threads (of each rank):
    of the ranks that are started here. device: `shm` and `gloo` are measured on `cpu`, the others on `cuda`; `auto`
    takes a GPU where there is one. throttle_gbps: GB/s of one-sided transports while hiding is measured; 0: over `shm`
    so slow that the rows of `exact` take as long as the local tiles, elsewhere none. seconds: for each kind of
    measurement, over all transports and exchanges.
    """

    transports: list[str] = field(default_factory=list)
    exchanges: list[str] = field(default_factory=lambda: list(EXCHANGES))
    world_size: int = 2
    threads: int = 1
    device: str = "auto"
    data_set: str = "redpajama"
    context: int = 8192
    seed: int = 0
    strategy: str = "flashcp"
    query_heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    dtype: str = "fp32"
    throttle_gbps: float = 0.0
    seconds: float = 30.0
    timeout_s: float = 60.0

    def check(self) -> None:
        """Raise ValueError, naming value, field and legal values."""
        for name, legal in (("transports", TRANSPORTS), ("exchanges", tuple(EXCHANGES))):
            for value in getattr(self, name):
                if value not in legal:
                    raise ValueError(f"{name} holds {value!r}: expected {', '.join(legal)}")
        choices = {"device": DEVICES, "data_set": LENGTH_DATA, "strategy": strategies(), "dtype": tuple(DTYPES)}
        for name, legal in choices.items():
            if getattr(self, name) not in legal:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(legal)}")
        least = {"world_size": 2, "threads": 1, "context": 2, "query_heads": 1, "kv_heads": 1, "head_dim": 1, "seed": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}={getattr(self, name)}: expected a whole number >= {smallest}")
        for name in ("seconds", "timeout_s"):
            if not 0 < getattr(self, name) <= LONGEST_WAIT_S:
                raise ValueError(f"{name}={getattr(self, name)}: expected seconds > 0 and <= {LONGEST_WAIT_S:.0e}")
        if not 0 <= self.throttle_gbps < math.inf:
            raise ValueError(f"throttle_gbps={self.throttle_gbps}: expected a number >= 0")
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
    def whole(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v of the whole pack and the gradient of its output, [tokens, heads, D], the same on every rank."""
        return self._draw(int(self.plan.offsets[-1]), self.bench.seed)

    @cached_property
    def local(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same of this rank's rows alone, [T, heads, D]."""
        return self._draw(int(self.plan.tokens[self.ranks.rank]), self.bench.seed + 1 + self.ranks.rank)

    @property
    def kv(self) -> tuple[ShardingPlan, Tensor, Tensor]:
        """What an exchange starts with: the plan, this rank's keys and values."""
        return self.plan, *self.local[1:3]

    def _draw(self, rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        random = torch.Generator().manual_seed(seed)
        heads = (self.bench.query_heads, self.bench.kv_heads, self.bench.kv_heads, self.bench.query_heads)
        dtype, device = DTYPES[self.bench.dtype][0], self.ranks.device
        q, k, v, grad = (
            torch.randn(rows, count, self.bench.head_dim, generator=random).to(device, dtype) for count in heads
        )
        return q, k, v, grad


def offered(bench: ExchangeBench, device: torch.device) -> dict[str, str]:
    """The transports that are asked for, or all that this group of ranks has, and for those it has not, why.

    Raises what its operator raises for one that was asked for and is not there. All ranks call this.
    """
    found = {}
    for transport in bench.transports or [name for name in TRANSPORTS if (name in ON_CPU) == (device.type == "cpu")]:
        try:
            if (transport in ON_CPU) != (device.type == "cpu"):
                raise ValueError(f"transport={transport!r} with device={device.type}: it moves rows of another device")
            operator(bench, transport, "exact")
        except (ValueError, RuntimeError, ImportError) as error:
            if bench.transports:
                raise
            found[transport] = str(error)
        else:
            found[transport] = ""
    return found


def operator(
    bench: ExchangeBench, transport: str, exchange: str, overlap: str = "none", throttle_gbps: float = 0.0
) -> ContextParallel:
    """The operator of one variant. Raises ValueError where the ranks have no such thing; all ranks call this."""
    return ContextParallel(
        exchange=exchange,
        overlap=overlap,
        transport=transport,
        timeout_s=bench.timeout_s,
        options=TransportOptions(throttle_gbps=throttle_gbps),
    )


def overlaps_of(bench: ExchangeBench, transport: str, exchange: str) -> list[str]:
    """Levels of overlap that a transport and an exchange have: `ulysses` waits for rows at every level."""
    if EXCHANGE_CLASSES[exchange].splits_heads:
        return ["none"]
    found = []
    for overlap in OVERLAPS:
        try:
            operator(bench, transport, exchange, overlap)
        except ValueError:
            continue
        found.append(overlap)
    return found


def check(cp: ContextParallel, small: Problem) -> None:
    """The gate: output, gradients and bytes of a small pack. Raises RuntimeError on all ranks when one is wrong."""
    whole, split, lengths = small.whole, small.plan, small.plan.document_lengths.tolist()
    q, k, v = (x.detach().requires_grad_() for x in whole[:3])
    reference = reference_attention(q, k, v, lengths)
    wanted = [reference, *torch.autograd.grad(reference, (q, k, v), whole[3].double())]
    q, k, v = (cp.shard(x, split).requires_grad_() for x in whole[:3])
    before = cp.sent_bytes
    out = cp.attention(q, k, v, split)
    between = cp.sent_bytes
    found = [out, *torch.autograd.grad(out, (q, k, v), cp.shard(whole[3], split))]
    error = max(relative_error(a, cp.shard(b, split)) for a, b in zip(found, wanted, strict=True))
    worst, limit = small.ranks.max(error)[0], DTYPES[small.bench.dtype][1]
    what = f"{cp.transport}/{cp.exchange}, overlap {cp.overlap}"
    if not worst <= limit:
        raise RuntimeError(f"{what}: relative error {worst:.1e}: an exchange that is wrong is not timed")
    check_bytes(cp, small, (between - before, cp.sent_bytes - between))


def check_bytes(cp: ContextParallel, problem: Problem, sent: Sequence[int]) -> tuple[int, int]:
    """What left the busiest rank in the forward and in the backward pass.

    sent: bytes that left this rank. Raises RuntimeError on all ranks where they are not the route's.
    """
    bench, exchange = problem.bench, EXCHANGE_CLASSES[cp.exchange]
    route, model = problem.plan.route(cp.exchange), DTYPES[bench.dtype][0]
    heads = bench.query_heads, bench.kv_heads, bench.head_dim
    forward = route.bytes(*heads, model.itemsize)
    backward = route.bytes(*heads, (exchange.gradient_dtype or model).itemsize, backward=True)
    differs = tuple(sent) != (forward[cp.rank], backward[cp.rank])
    if problem.ranks.max(differs)[0]:
        raise RuntimeError(
            f"{cp.transport}/{cp.exchange}: rank {cp.rank} sent {sent[0]} and {sent[1]} bytes, the route says "
            f"{forward[cp.rank]} and {backward[cp.rank]}"
        )
    return int(forward.max()), int(backward.max())
