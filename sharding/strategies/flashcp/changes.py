"""Changes to a plan: what a document's holders would be if two ranks moved or divided it, and taking that over.

The functions run as they stand, or compiled by numba (`compiled`): whole numbers only.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flashcp.sharding.strategies.flashcp.state import Holders, find

__all__ = ["Held", "adopt", "note", "propose_moved", "propose_split"]


class Held(NamedTuple):
    """The documents of each rank, in no order: for picking one, int64."""

    number: np.ndarray  # [ranks]
    document: np.ndarray  # [ranks, documents]
    place: np.ndarray  # [documents, ranks] where a document stands among a rank's


def note(held: Held, document: int, rank: int) -> None:
    """Add a document to a rank's."""
    held.place[document, rank] = held.number[rank]
    held.document[rank, held.number[rank]] = document
    held.number[rank] += 1


def propose_split(
    holders: Holders,
    document: int,
    first: int,
    second: int,
    rows: int,
    work: int,
    heads: bool,
    trial: Holders,
    at: int,
) -> None:
    """Write into trial[at] the document with `rows` and `work` of what two ranks hold of it on `first`, the rest
    on `second`. `heads`: the first takes heads only and the lowest rows there are.
    """
    one, two = find(holders, document, first), find(holders, document, second)
    all_rows, all_work = 0, 0
    for slot in (one, two):
        if slot >= 0:
            all_rows += holders.rows[document, slot]
            all_work += holders.work[document, slot]
    low, high = min(one, two), max(one, two)
    if low < 0:
        low = high
    count = 0
    for slot in range(-1, holders.number[document]):
        if (slot == -1 if heads else slot == low) and rows > 0:
            trial.rank[at, count] = first
            trial.rows[at, count] = rows
            trial.work[at, count] = work
            count += 1
        if slot == high and rows < all_rows:
            trial.rank[at, count] = second
            trial.rows[at, count] = all_rows - rows
            trial.work[at, count] = all_work - work
            count += 1
        if slot >= 0 and slot != one and slot != two:
            trial.rank[at, count] = holders.rank[document, slot]
            trial.rows[at, count] = holders.rows[document, slot]
            trial.work[at, count] = holders.work[document, slot]
            count += 1
    trial.number[at] = count
    trial.length[at] = holders.length[document]


def propose_moved(holders: Holders, document: int, giver: int, taker: int, trial: Holders, at: int) -> None:
    """Write into trial[at] the document with all that `giver` holds of it on `taker`."""
    gone, old = find(holders, document, giver), find(holders, document, taker)
    count = 0
    for slot in range(holders.number[document]):
        if slot == old:
            continue
        trial.rank[at, count] = holders.rank[document, slot]
        trial.rows[at, count] = holders.rows[document, slot]
        trial.work[at, count] = holders.work[document, slot]
        if slot == gone:
            trial.rank[at, count] = taker
            if old >= 0:
                trial.rows[at, count] += holders.rows[document, old]
                trial.work[at, count] += holders.work[document, old]
        count += 1
    trial.number[at] = count
    trial.length[at] = holders.length[document]


def adopt(holders: Holders, document: int, trial: Holders, at: int, ranks: tuple[int, int], held: Held) -> None:
    """Make trial[at] the holders of a document; of the ranks, only two can have come or gone."""
    for rank in ranks:
        before, after = find(holders, document, rank) >= 0, find(trial, at, rank) >= 0
        if before and not after:
            held.number[rank] -= 1
            mover = held.document[rank, held.number[rank]]
            held.document[rank, held.place[document, rank]] = mover
            held.place[mover, rank] = held.place[document, rank]
        elif after and not before:
            note(held, document, rank)
    count = trial.number[at]
    holders.number[document] = count
    holders.rank[document, :count] = trial.rank[at, :count]
    holders.rows[document, :count] = trial.rows[at, :count]
    holders.work[document, :count] = trial.work[at, :count]
    holders.tail[document, :count] = trial.tail[at, :count]
