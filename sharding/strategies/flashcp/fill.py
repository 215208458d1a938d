"""A first plan of `flashcp`: rank after rank is filled, to the row and to the pair.

It runs as it stands, or compiled by numba: whole numbers only.
"""

from __future__ import annotations

import numpy as np

from flashcp.sharding.strategies.flashcp.density import Density, below, split
from flashcp.sharding.strategies.flashcp.state import Holders


def hold(holders: Holders, document: int, rank: int, rows: int, work: int) -> None:
    """Give a rank rows of a document, more of them if it holds some."""
    slot = 0
    while slot < holders.number[document] and holders.rank[slot, document] != rank:
        slot += 1
    if slot == holders.number[document]:
        holders.number[document] = slot + 1
        holders.rank[slot, document] = rank
        holders.rows[slot, document] = 0
        holders.work[slot, document] = 0
    holders.rows[slot, document] += rows
    holders.work[slot, document] += work


def first_whole(low: np.ndarray, high: np.ndarray, at: int, end: int, rows: int, work: int, light: int) -> int:
    """The first document from `at` that fits whole and leaves work enough for the other rows; `end` if there is none.

    light: twice the mean work of the lightest rows there are.
    """
    while at < end:
        left, twice = high[at] - low[at], (low[at] + high[at] + 1) * (high[at] - low[at])
        if 0 < left <= rows and twice <= 2 * work and 2 * work - twice >= light * (rows - left):
            break
        at += 1
    return at


def last_to_close(low: np.ndarray, high: np.ndarray, first: int, at: int, rows: int, work: int) -> int:
    """The last document up to `at` of which a tail and a head make both rows and work; first - 1 if there is none."""
    while at >= first:
        lightest, densest = 2 * low[at] + rows + 1, 2 * high[at] - rows + 1
        if high[at] - low[at] > rows and rows * lightest <= 2 * work <= rows * densest:
            break
        at -= 1
    return at


def fill(holders: Holders, documents: int, room: np.ndarray, target: np.ndarray, look: bool) -> None:
    """Hand out the first `documents` documents, sorted longest first, to ranks that miss `room` rows, `target` work.

    The rows that are left always have the mean work that the ranks still to be filled need, so the longest document
    is at least that dense: a rank takes it whole if that is not too much, else a tail and a head of it, after as
    many of the shortest documents as bring the mean per row down to what tail and head give. The last rank takes
    the rest, and its rows and work are what it needs.

    look: beyond the longest document, and never take one that leaves less work than the lightest rows have. A rank
    that can take the longest whole takes the next longest that it can, and closes with the shortest that can close.
    """
    low = np.zeros(documents, dtype=np.int64)
    high = holders.length[:documents].copy()
    longest, shortest = 0, documents - 1
    for rank in range(len(room)):
        rows, work = room[rank], target[rank]
        last = rank == len(room) - 1
        peels, whole = not look or last, 0  # peels: takes from the longest document and from the shortest only
        while rows > 0:
            while high[longest] == low[longest]:
                longest += 1
            while high[shortest] == low[shortest]:
                shortest -= 1
            light = low[shortest] + high[shortest] + 1  # twice the mean work of its rows
            cut = longest
            if not peels:
                cut = whole = first_whole(low, high, max(whole, longest), shortest + 1, rows, work, light)
                if whole > longest and rows == room[rank]:
                    cut = longest - 1
                elif whole > shortest:
                    cut = last_to_close(low, high, longest, shortest, rows, work)
                if cut < longest:
                    peels, cut = True, longest
            left = high[cut] - low[cut]
            dense = low[cut] + high[cut] + 1
            pairs = dense * left // 2
            enough = not look or 2 * (work - pairs) >= light * (rows - left)
            if left <= rows and ((pairs <= work and enough) or last):
                hold(holders, cut, rank, left, pairs)
                rows -= left
                work -= pairs
                low[cut] = high[cut]
                continue
            if peels and dense > light and rows * dense > 2 * work:
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
            pairs = taken * low[cut] + taken * (taken + 1) // 2
            span = left - taken
            tail = taken
            if span > 0:
                tail = min(max((work - pairs) // span, 0), taken)
            pairs += tail * span
            hold(holders, cut, rank, taken, pairs)
            high[cut] -= tail
            low[cut] += taken - tail
            rows -= taken
            work -= pairs


def fill_mix(holders: Holders, documents: int, room: np.ndarray, target: np.ndarray, density: Density) -> None:
    """The same for any density, documents sorted densest first: whole if it fits, else tail and head, after as many
    rows of the least dense documents as bring the mean down; as wanted to within what a row more or less changes.
    """
    low = np.zeros(documents, dtype=np.int64)
    high = holders.length[:documents].copy()
    densest, lightest = 0, documents - 1
    for rank in range(len(room)):
        rows, work = room[rank], target[rank]
        last = rank == len(room) - 1
        while rows > 0:
            while high[densest] == low[densest]:
                densest += 1
            while high[lightest] == low[lightest]:
                lightest -= 1
            left = high[densest] - low[densest]
            before = below(density, densest, low[densest])
            pairs = below(density, densest, high[densest]) - before
            if left <= rows and (pairs <= work or last):
                hold(holders, densest, rank, left, pairs)
                rows -= left
                work -= pairs
                low[densest] = high[densest]
                continue
            dense = pairs // left
            below_light = below(density, lightest, low[lightest])
            light = below(density, lightest, high[lightest]) - below_light
            if dense > light // (high[lightest] - low[lightest]) and rows * dense > work:
                first = below(density, lightest, low[lightest] + 1) - below_light
                taken = max(1, (rows * dense - work) // max(dense - first, 1))
                taken = min(taken, rows, high[lightest] - low[lightest])
                pairs = below(density, lightest, low[lightest] + taken) - below_light
                hold(holders, lightest, rank, taken, pairs)
                low[lightest] += taken
                rows -= taken
                work -= pairs
                continue
            taken = min(rows, left)
            tail = taken
            if taken < left:
                tail = split(density, densest, low[densest], high[densest], taken, work, before, before + pairs)
            pairs = below(density, densest, low[densest] + taken - tail) - before
            pairs += below(density, densest, high[densest]) - below(density, densest, high[densest] - tail)
            hold(holders, densest, rank, taken, pairs)
            high[densest] -= tail
            low[densest] += taken - tail
            rows -= taken
            work -= pairs


HELPERS = (hold, first_whole, last_to_close)
"""What `fill` and `fill_mix` call in this file."""
