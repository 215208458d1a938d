"""Published ways to place the documents of a whole batch, as plans over all ranks, at their best effort.

Each is read from its paper or source and made no worse than described: work is balanced without asking for memory, all
documents run in one round, a rank sends a row only to those that read it. What each costs with its own collectives and
kernels is not described well enough to be priced as published.

dynamic_cp: Megatron Core's hybrid context parallelism (its `data_schedule.py`): the longest sequence sizes a group, in
powers of two, and groups are filled to equal work. Its source runs rounds with a barrier between them, sizes a group
by memory alone and then doubles the smallest; here a group is doubled while a rank of it has more than its share.
flexible_cp: FCP (arXiv 2602.21788): groups of any size, from a program that balances them; here the least time that any
sizes allow, over long documents alone and short ones packed on ranks of their own.
FCP (arXiv 2605.08524), which bin-packs blocks over all ranks and sends them from peer to peer, is at its best
`flashcp`'s plan, which cuts anywhere: see `variants.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flashcp.sharding.masks import Workload, read_workload
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.shards import ShardTable, shard_work


def dynamic_cp(document_lengths: np.ndarray, ranks: int, workload: Workload | None = None) -> ShardingPlan:
    """Groups of 1, 2, 4, ... neighbours, each as large as its longest document asks for."""
    lengths, work = document_lengths, _work(document_lengths, workload)
    share, rows = work.sum() / ranks, -(-int(lengths.sum()) // ranks)
    wanted = np.maximum(np.maximum(lengths / rows, work / share), 1)
    sizes = np.minimum(2 ** np.ceil(np.log2(wanted)), 2 ** np.floor(np.log2(ranks))).astype(np.int64)
    load, first = np.zeros(ranks), np.zeros(len(lengths), dtype=np.int64)
    for document in np.argsort(-work / sizes, kind="stable").tolist():
        size = int(sizes[document])
        groups = load[: ranks // size * size].reshape(-1, size)
        group = int(np.argmin(groups.max(axis=1)))
        groups[group] += work[document] / size
        first[document] = group * size
    return in_groups(lengths, ranks, first, sizes, workload)


def flexible_cp(document_lengths: np.ndarray, ranks: int, workload: Workload | None = None) -> ShardingPlan:
    """Groups of any size for documents with more work than a rank's share, one rank each for the packs of others."""
    work = _work(document_lengths, workload)
    low, high = work.sum() / ranks, max(float(work.max()), work.sum() / ranks)
    for _ in range(50):  # the least work of a rank with which all groups find their ranks
        middle = (low + high) / 2
        low, high = (low, middle) if _groups(work, middle).sum() <= ranks else (middle, high)
    sizes = _groups(work, high)[:-1].tolist()
    long = np.argsort(-work, kind="stable")[: len(sizes)]
    packs = ranks - sum(sizes)
    size, first = np.ones(len(work), dtype=np.int64), np.zeros(len(work), dtype=np.int64)
    size[long], first[long] = sizes, np.cumsum(sizes) - sizes
    load = np.zeros(max(1, packs))
    for document in np.argsort(-work, kind="stable")[len(sizes) :].tolist():
        rank = int(np.argmin(load))
        load[rank] += work[document]
        first[document] = ranks - len(load) + rank
    return in_groups(document_lengths, ranks, first, size, workload)


def _work(lengths: np.ndarray, workload: Workload | None) -> np.ndarray:
    """Of each document; without a workload all is causal."""
    if workload is None:
        return shard_work(0, lengths)
    return workload.pairs(np.arange(len(lengths)), np.zeros_like(lengths), lengths)


def _groups(work: np.ndarray, most: float) -> np.ndarray:
    """Ranks of each document that has more work than `most`, heaviest first, and of all others together."""
    long = work > most
    sizes = np.ceil(np.sort(work[long])[::-1] / most)
    return np.append(sizes, np.ceil(work[~long].sum() / most)).astype(np.int64)


def in_groups(
    document_lengths: np.ndarray, ranks: int, first: np.ndarray, size: np.ndarray, workload: Workload | None = None
) -> ShardingPlan:
    """Each document on `size` neighbours from rank `first` on, two chunks each: one from either end (zigzag)."""
    document = np.repeat(np.arange(len(size)), 2 * size)
    chunk = np.arange(len(document)) - np.repeat(np.cumsum(2 * size) - 2 * size, 2 * size)
    chunks, rows = 2 * size[document], document_lengths[document]
    start, stop = chunk * rows // chunks, (chunk + 1) * rows // chunks
    rank = first[document] + np.minimum(chunk, chunks - 1 - chunk)
    table = ShardTable(document, start, stop, rank).take(stop > start)
    return ShardingPlan(document_lengths, ranks, table, "groups", workload=workload or read_workload(document_lengths))


RIVALS: dict[str, Callable[[np.ndarray, int, Workload | None], ShardingPlan]] = {
    "dynamic_cp": dynamic_cp,
    "flexible_cp": flexible_cp,
}
