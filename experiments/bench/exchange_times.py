"""How long exchanges take, and how much of that attention hides: what the exchange benchmark measures on its ranks.

Ranks begin each measurement together, variants take turns, a time is the slowest rank's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from flashcp.comm.exchanges.exchange import IncomingKV
from flashcp.context_parallel import ContextParallel
from flashcp.experiments.bench.exchange_cases import (
    ExchangeBench,
    Problem,
    check,
    check_bytes,
    offered,
    operator,
    overlaps_of,
)
from flashcp.kernels.inputs import default_scale
from flashcp.kernels.interface import KV
from flashcp.kernels.schedule import Schedule
from flashcp.kernels.selection import select_attention
from flashcp.sharding.plan import ShardingPlan
from flashcp.train.ranks import Ranks

__all__ = ["Number", "in_turns", "measure", "moving", "ranks_max"]

FEWEST_ROUNDS, MOST_ROUNDS = 5, 100
Pair = tuple[str, str]  # transport, exchange
Work = Callable[[], object]
Key = TypeVar("Key")


class Number(NamedTuple):
    """One measured number of a transport and an exchange."""

    pair: Pair
    metric: str
    unit: str
    p20: float | None
    median: float
    p80: float | None


def measure(bench: ExchangeBench, ranks: Ranks, say: Callable[[str], None]) -> Iterator[Number]:
    """Check every variant, then count bytes, then time. All ranks call this and get the same numbers.

    sent_bytes, sent_backward_bytes: that leave the busiest rank. latency_us: of one row a rank. exchange_ms: from the
    start until the sampled plan's rows are there and have left, nothing computed meanwhile (of `ulysses` K and V).
    bandwidth_gbps: bytes of that from the busiest rank over exchange_ms. The rest is about hiding (`hiding`).
    Raises RuntimeError for a wrong result or wrong bytes, ValueError where nothing is there to measure.
    """
    there = offered(bench, ranks.device)
    for transport, why in there.items():
        if why:
            say(f"{transport}: left out: {why}")
    levels = {
        (transport, exchange): overlaps_of(bench, transport, exchange)
        for transport, why in there.items()
        for exchange in bench.exchanges
        if not why
    }
    if not levels:
        raise ValueError(f"transports={bench.transports}: expected some that a group on {ranks.device.type} has")
    small, full, row = (Problem(bench, plan, ranks) for plan in (bench.small(), bench.sampled(), bench.one_row()))
    for pair, found in levels.items():
        for overlap in found:
            check(operator(bench, *pair, overlap), small)
        say(f"{'/'.join(pair)}: right at overlap {', '.join(found)}")
    plain = {pair: operator(bench, *pair) for pair in levels}
    for pair, cp in plain.items():
        for metric, count in zip(("sent_bytes", "sent_backward_bytes"), counted(cp, full), strict=True):
            yield Number(pair, metric, "bytes", None, count, None)
    say("bytes are the routes'; timing the exchanges alone")
    one_row = {pair: moving(cp, *row.kv) for pair, cp in plain.items()}
    for pair, times in in_turns(one_row, ranks, bench.seconds).items():
        yield Number(pair, "latency_us", "us", *spread(1e3 * ranks_max(ranks, times)))
    whole = {pair: moving(cp, *full.kv) for pair, cp in plain.items()}
    moved = {pair: ranks.max(sent_by(cp, whole[pair]))[0] for pair, cp in plain.items()}
    for pair, times in in_turns(whole, ranks, bench.seconds).items():
        slowest = ranks_max(ranks, times)
        yield Number(pair, "exchange_ms", "ms", *spread(slowest))
        yield Number(pair, "bandwidth_gbps", "GB/s", *spread(moved[pair] / slowest / 1e6))
    say("timing attention with the exchange")
    yield from hiding(bench, full, plain, levels)


def hiding(
    bench: ExchangeBench, full: Problem, plain: Mapping[Pair, ContextParallel], levels: Mapping[Pair, Sequence[str]]
) -> Iterator[Number]:
    """What is exposed of each exchange beside the attention of the same rows, forward.

    compute_ms: attention with all rows there. exposed_*_ms: the operator's time beyond that, round by round on each
    rank, the largest of all ranks. hidden_*: 1 - exposed / exposed at overlap none; not given where even overlap none
    exposes less than compute_ms varies. throttle_gbps: what the rows were slowed down to, if they were.
    """
    ranks, work, throttles = full.ranks, {}, {}
    with_levels = {pair: found for pair, found in levels.items() if len(found) > 1}
    slowed = bench.throttle_gbps or _as_slow_as_local_tiles(bench, full, plain)
    for pair, found in with_levels.items():
        throttles[pair] = slowed if bench.throttle_gbps or pair[0] == "shm" else 0.0
        work[pair, "compute"] = computing(plain[pair], full)
        for overlap in found:
            work[pair, overlap] = attending(operator(bench, *pair, overlap, throttles[pair]), full)
    times = in_turns(work, ranks, bench.seconds)
    for pair, found in with_levels.items():
        compute = times[pair, "compute"]
        p20, median, p80 = spread(ranks_max(ranks, compute))
        yield Number(pair, "compute_ms", "ms", p20, median, p80)
        exposed = {overlap: ranks_max(ranks, times[pair, overlap] - compute) for overlap in found}
        for overlap in found:
            yield Number(pair, f"exposed_{overlap}_ms", "ms", *spread(exposed[overlap]))
        if throttles[pair]:
            yield Number(pair, "throttle_gbps", "GB/s", None, throttles[pair], None)
        if spread(exposed["none"])[0] > p80 - p20:
            for overlap in found[1:]:
                yield Number(pair, f"hidden_{overlap}", "share", *spread(1 - exposed[overlap] / exposed["none"]))


def _as_slow_as_local_tiles(bench: ExchangeBench, full: Problem, plain: Mapping[Pair, ContextParallel]) -> float:
    """GB/s at which the rows of `exact` take as long as the local tiles, on the busiest ranks; 0 without such rows."""
    cp = next(iter(plain.values()))
    local = attend(full, cp._exchange.layout(full.plan).local_schedule, full.local[1][:0], full.local[2][:0])
    times = in_turns({"local": local}, full.ranks, bench.seconds / 4)["local"]
    ms = spread(ranks_max(full.ranks, times))[1]
    size = full.local[1].element_size()
    moved = full.plan.route("exact").bytes(bench.query_heads, bench.kv_heads, bench.head_dim, size).max()
    return float(moved) / ms / 1e6


def counted(cp: ContextParallel, problem: Problem) -> tuple[int, int]:
    """Bytes that left the busiest rank, forward and backward, counted while one attention ran each way."""
    q, k, v = (x.clone().requires_grad_() for x in problem.local[:3])
    before = cp.sent_bytes
    out = cp.attention(q, k, v, problem.plan)
    between = cp.sent_bytes
    out.backward(problem.local[3])
    return check_bytes(cp, problem, (between - before, cp.sent_bytes - between))


def sent_by(cp: ContextParallel, work: Work) -> int:
    """Bytes that leave this rank during the work."""
    before = cp.sent_bytes
    work()
    return cp.sent_bytes - before


def moving(cp: ContextParallel, plan: ShardingPlan, k: Tensor, v: Tensor) -> Work:
    """The exchange alone: from its start until all rows are there and this rank's have left."""
    return lambda: _free(cp, _received(cp, plan, k, v))


def attending(cp: ContextParallel, problem: Problem) -> Work:
    """Attention as the operator does it, without gradients."""
    q, k, v, _ = problem.local
    return torch.no_grad()(lambda: cp.attention(q, k, v, problem.plan))


def computing(cp: ContextParallel, problem: Problem) -> Work:
    """What the operator computes, with all rows there before it begins."""
    incoming = _received(cp, *problem.kv)
    received = incoming.inbox.rows.clone()
    _free(cp, incoming)
    return attend(problem, cp._exchange.layout(problem.plan).schedule, *received.unbind(1))


def attend(problem: Problem, schedule: Schedule, k: Tensor, v: Tensor) -> Work:
    """Attention of this rank's rows over a schedule, k and v the receive buffer."""
    queries, keys, values, _ = problem.local
    kernel = select_attention("auto", queries.device)
    scale = default_scale(queries, None)
    return torch.no_grad()(lambda: kernel.attend(queries, KV(keys, values), KV(k, v), schedule, scale))


def _received(cp: ContextParallel, plan: ShardingPlan, k: Tensor, v: Tensor) -> IncomingKV:
    incoming = cp._exchange.start(plan, k, v)
    incoming.transfer.finish()
    return incoming


def _free(cp: ContextParallel, incoming: IncomingKV) -> None:
    cp._exchange.transport.free(incoming.inbox.ticket)


def in_turns(work: Mapping[Key, Work], ranks: Ranks, seconds: float = 0.0, rounds: int = 0) -> dict[Key, np.ndarray]:
    """Milliseconds of each function on this rank, [rounds], one after the other in each round.

    Before each, all ranks wait for each other. The first round warms up and is not among them. rounds: 0 for as many as
    fit into `seconds`, within bounds.
    """

    def once(function: Work) -> float:
        ranks.barrier()
        started = time.perf_counter()
        function()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
        return 1e3 * (time.perf_counter() - started)

    began = time.perf_counter()
    for function in work.values():
        once(function)
    took = ranks.max(time.perf_counter() - began)[0]
    rounds = rounds or int(min(MOST_ROUNDS, max(FEWEST_ROUNDS, seconds / took)))
    times = [[once(function) for function in work.values()] for _ in range(rounds)]
    return dict(zip(work, np.array(times).T, strict=True))


def ranks_max(ranks: Ranks, values: np.ndarray) -> np.ndarray:
    """The largest of all ranks, round by round."""
    return np.array(ranks.max(*values.tolist()))


def spread(values: np.ndarray) -> tuple[float, float, float]:
    """p20, median, p80."""
    p20, median, p80 = np.percentile(values, [20, 50, 80]).tolist()
    return p20, median, p80
