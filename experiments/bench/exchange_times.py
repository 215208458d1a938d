"""How long exchanges take, and how much of that attention hides: what the exchange benchmark measures on its ranks.

Ranks begin each measurement together, variants take turns, a time is the slowest rank's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashcp.context_parallel import ContextParallel
from flashcp.experiments.bench.exchange_cases import (
    ExchangeBench,
    Problem,
    both_ways,
    check,
    offered,
    operator,
    overlaps_of,
)
from flashcp.experiments.bench.harness import Work, in_turns, spread
from flashcp.experiments.sweep.results import Number
from flashcp.kernels.inputs import default_scale
from flashcp.kernels.interface import KV
from flashcp.kernels.schedule import Schedule
from flashcp.kernels.selection import select_attention
from flashcp.sharding.plan import ShardingPlan
from flashcp.train.ranks import Ranks

__all__ = ["exchanged", "measure", "ranks_max"]


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
    small, full, row = (Problem(bench, plan, ranks) for plan in (bench.small(), bench.sampled(), bench.one_row()))
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
    one_row = {name: partial(exchanged, cp, *row.kv) for name, cp in plain.items()}
    for name, times in in_turns(one_row, ranks, bench.seconds).items():
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
    incoming.wait()
    incoming.leave()
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
