"""A first plan, exact in tokens and in work: fill rank after rank from the longest documents, thinned by the shortest.

Runs as it stands, or compiled by numba (`compiled`): whole numbers only.
"""

from __future__ import annotations

import numpy as np

from flashcp.sharding.strategies.flashcp.state import Holders

__all__ = ["fill", "hold"]


def hold(holders: Holders, document: int, rank: int, rows: int, work: int) -> None:
    """Give a rank more rows and work of a document."""
    slot = 0
    while slot < holders.number[document] and holders.rank[document, slot] != rank:
        slot += 1
    if slot == holders.number[document]:
        holders.number[document] = slot + 1
        holders.rank[document, slot] = rank
        holders.rows[document, slot] = 0
        holders.work[document, slot] = 0
    holders.rows[document, slot] += rows
    holders.work[document, slot] += work


def fill(holders: Holders, documents: int, room: np.ndarray, target: np.ndarray) -> None:
    """Hand out the first `documents` documents, sorted longest first, to ranks that miss `room` rows, `target` work.

    The rows that are left always have the mean work that the ranks still to be filled need, so the longest document
    is at least that dense: a rank takes it whole if that is not too much, else a tail and a head of it, after as
    many of the shortest documents as bring the mean per row down to what tail and head give. The last rank takes
    the rest, and its rows and work are what it needs.
    """
    low = np.zeros(documents, dtype=np.int64)
    high = holders.length[:documents].copy()
    longest, shortest = 0, documents - 1
    for rank in range(len(room)):
        rows, work = room[rank], target[rank]
        last = rank == len(room) - 1
        while rows > 0:
            while high[longest] == low[longest]:
                longest += 1
            while high[shortest] == low[shortest]:
                shortest -= 1
            left = high[longest] - low[longest]
            pairs = (low[longest] + high[longest] + 1) * left // 2
            if left <= rows and (pairs <= work or last):
                hold(holders, longest, rank, left, pairs)
                rows -= left
                work -= pairs
                low[longest] = high[longest]
                continue
            dense = low[longest] + high[longest] + 1  # twice the mean work of its rows
            if dense > low[shortest] + high[shortest] + 1 and rows * dense > 2 * work:
                # As if all its rows were as light as the first: never too many, and the loop comes back for more.
                taken = max(1, (rows * dense - 2 * work) // (dense - 2 * low[shortest] - 1))
                taken = min(taken, rows, high[shortest] - low[shortest])
                pairs = taken * low[shortest] + taken * (taken + 1) // 2
                hold(holders, shortest, rank, taken, pairs)
                low[shortest] += taken
                rows -= taken
                work -= pairs
                continue
            taken = min(rows, left)
            pairs = taken * low[longest] + taken * (taken + 1) // 2
            span = left - taken
            tail = taken
            if span > 0:
                tail = min(max((work - pairs) // span, 0), taken)
            pairs += tail * span
            hold(holders, longest, rank, taken, pairs)
            high[longest] -= tail
            low[longest] += taken - tail
            rows -= taken
            work -= pairs
