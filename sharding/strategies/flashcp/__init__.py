"""`flashcp`: equal tokens, balanced work, and as few KV rows on the busiest rank as a search finds (docs/planner.md)."""

from __future__ import annotations

import numpy as np

from flashcp.sharding.plan import ShardTable
from flashcp.sharding.strategies.flashcp.compiled import Loops, loops
from flashcp.sharding.strategies.flashcp.state import Holders, no_holders

__all__ = ["flashcp"]

SMALL_WINDOW = 4096
SEED = 12345
STARTS=8


def flashcp(
    document_lengths: np.ndarray,
    world_size: int,
    tolerance: float = 1.01,
    budget: int | None = None,
    total_weight: float = 0.0,
    granularity: int = 1,
    max_split: int | None = None,
    multicast: bool = False,
) -> ShardTable:
    if world_size == 1:
        n=len(document_lengths)
        return ShardTable(np.arange(n),np.zeros(n,np.int64),document_lengths.copy(),np.zeros(n,np.int64))
    tokens = int(document_lengths.sum())
    compiled = tokens > SMALL_WINDOW
    run = loops(compiled)
    if budget is None:
        budget = 36_000 + 700 * world_size if compiled else 400
    order = np.argsort(-document_lengths, kind="stable")
    length = document_lengths[order]
    work = length * (length + 1) // 2
    room = np.full(world_size, tokens // world_size)
    room[: tokens % world_size] += 1
    total = int(work.sum())
    share, rest = divmod(total, world_size)
    target = np.full(world_size, share); target[:rest] += 1
    limit = int(tolerance * total / world_size)
    base = no_holders(length, world_size + 1)
    run.fill(base, len(length), room, target)
    trial = no_holders(np.zeros(3, np.int64), world_size + 2)
    starts = min(STARTS, max(1, budget // 4000))
    stages = starts.bit_length()
    runs = [(0,0,base.copy(), np.array([SEED + 7919 * i])) for i in range(starts)]
    while True:
        each = budget // stages // len(runs)
        done=[]
        for _,_,h,seed in runs:
            ex,cr = run.improve(h, trial, len(length), world_size, limit, each, seed, int(64*total_weight), max_split or world_size, granularity, multicast)
            done.append((ex,cr,h,seed))
        done.sort(key=lambda t: t[:2])
        if len(runs)==1: break
        runs = done[:max(1,len(runs)//2)]
    return table(done[0][2], order)

def table(holders: Holders, order: np.ndarray) -> ShardTable:
    """The pieces of every document: heads in holders' order from the start, tails from the end."""
    document, slot = np.nonzero(np.arange(holders.rank.shape[1]) < holders.count[:, None])
    rank, rows, tail = (a[document, slot] for a in (holders.rank, holders.rows, holders.tail))
    first = np.concatenate(([0], np.cumsum(holders.count)))[document]

    def within(amount: np.ndarray) -> np.ndarray:
        """Sum over the earlier holders of the same document."""
        before = np.cumsum(amount) - amount
        return before - before[first]

    head = rows - tail
    low, high = within(head), holders.length[document] - within(tail)
    pieces = ShardTable(
        np.tile(order[document], 2),
        np.concatenate((low, high - tail)),
        np.concatenate((low + head, high)),
        np.tile(rank, 2),
    )
    return ShardTable(*(column[pieces.stop > pieces.start] for column in pieces))
