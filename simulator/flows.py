"""Transfers that share ports, event by event: when does each arrive?

Every rank has four ports: to its node and to the network, in and out (where a node has one network port, its ranks
share that), and a queue of transfers for each level. Queues start their transfers in order, so many at a time; a port
shares its rate evenly between the transfers that pass it, and a transfer runs at the lesser of its two shares. Events
are the ends of transfers and the moments they may start.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from flashcp.sharding.compiled import compiled_twins
from flashcp.simulator.cost import Links

AT_ONCE = 8
"""Transfers of one queue under way together: one would leave ports idle while sources are busy with others."""


def carry_all(moved_bytes: np.ndarray, links: Links, *, pull: bool, release_us: np.ndarray) -> np.ndarray:
    """When what rank i sends to rank j has arrived, us [N, N] (source, destination); 0 where nothing is sent.

    moved_bytes: [N, N]. pull: queues are the destinations', which fetch from rank - 1, rank - 2, ...; else the
    sources', which send to them in that order. release_us, broadcast to [N, N]: when a transfer may start.
    """
    ranks = len(moved_bytes)
    owner = np.repeat(np.arange(ranks), ranks - 1)
    other = (owner - 1 - np.arange(len(owner)) % max(1, ranks - 1)) % ranks
    node = links.nodes(ranks)
    level = (node[owner] == node[other]).astype(np.int64)
    queue = 2 * owner + level
    source, destination = (other, owner) if pull else (owner, other)
    order = np.argsort(queue, kind="stable")
    order = order[moved_bytes[source, destination][order] > 0]
    arrived = np.zeros((ranks, ranks))
    if not len(order):
        return arrived
    queue, source, destination, level = (column[order] for column in (queue, source, destination, level))
    release = np.broadcast_to(release_us, moved_bytes.shape)[source, destination]
    rate = np.array([links.network.gbps, links.node.gbps]) * 1e3
    latency = np.array([links.network.latency_us, links.node.latency_us])
    moved = moved_bytes[source, destination].astype(np.float64)
    first = np.searchsorted(queue, np.arange(2 * ranks + 1))
    ports = np.stack([node if links.shared_port else np.arange(ranks), np.arange(ranks)])  # by level and rank
    out, into = ports[level, source], ports[level, destination]
    done = _compiled()(first, out, into, level, moved, release, rate, links.multicast, AT_ONCE)
    arrived[source, destination] = done + latency[level]
    return arrived


def carry(
    first: np.ndarray,
    out: np.ndarray,
    into: np.ndarray,
    level: np.ndarray,
    moved: np.ndarray,
    release: np.ndarray,
    rate: np.ndarray,
    multicast: bool,
    at_once: int,
) -> np.ndarray:
    """When the last byte of each transfer has left, us; transfers of queue q stand at first[q] : first[q + 1].

    out, into: ports that each leaves and comes in by. level: 0 across nodes, 1 within one. rate: bytes a microsecond of
    a port, by level. multicast: within a node what leaves is not shared, for the switch makes the copies.
    """
    queues, count = len(first) - 1, len(out)
    left, speed, done = moved.copy(), np.zeros(count), np.zeros(count)
    under_way = np.zeros(count, np.bool_)
    head = first[:-1].copy()  # of each queue: the first transfer not yet started
    flying = np.zeros(queues, np.int64)
    out_use = np.zeros((2, queues // 2), np.int64)  # transfers through each port, by level
    in_use = np.zeros((2, queues // 2), np.int64)
    now = 0.0
    finished = 0
    while finished < count:
        following = np.inf
        for q in range(queues):
            while head[q] < first[q + 1] and flying[q] < at_once and release[head[q]] <= now:
                i = head[q]
                under_way[i] = True
                out_use[level[i], out[i]] += 1
                in_use[level[i], into[i]] += 1
                flying[q] += 1
                head[q] += 1
            if head[q] < first[q + 1] and flying[q] < at_once:
                following = min(following, release[head[q]])
        step = following - now
        for q in range(queues):
            for i in range(first[q], head[q]):
                if under_way[i]:
                    sharing = in_use[level[i], into[i]]
                    if not (multicast and level[i] == 1):
                        sharing = max(sharing, out_use[level[i], out[i]])
                    speed[i] = rate[level[i]] / sharing
                    step = min(step, left[i] / speed[i])
        now += step
        for q in range(queues):
            for i in range(first[q], head[q]):
                if under_way[i]:
                    left[i] -= step * speed[i]
                    if left[i] <= 1e-6 * moved[i]:
                        under_way[i] = False
                        done[i] = now
                        out_use[level[i], out[i]] -= 1
                        in_use[level[i], into[i]] -= 1
                        flying[q] -= 1
                        finished += 1
    return done


@cache
def _compiled() -> Callable[..., Any]:
    """`carry` as numba compiles it, as it stands where there is no numba."""
    try:
        return compiled_twins([carry])[0]
    except ModuleNotFoundError:
        return carry
