"""What the search works on: how many rows and how much work each rank holds of each document, and what follows.

`find`, `layout` and `charge` run as they stand, or compiled by numba (`compiled`): whole numbers only.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["Holders", "charge", "find", "layout", "no_holders"]


class Holders(NamedTuple):
    """Who holds how much of each document, int64. Documents are sorted, longest first; bundles come last.

    A bundle is several whole short documents that move together; its length is their tokens.
    The pieces follow from the holders' order (`layout`).
    """

    length: np.ndarray  # [documents]
    number: np.ndarray  # [documents] holders of each
    rank: np.ndarray  # [documents, slots] the holders, in the order in which they take their tails
    rows: np.ndarray  # [documents, slots]
    work: np.ndarray  # [documents, slots]
    tail: np.ndarray  # [documents, slots] rows taken from the end; the others are taken from the start

    def copy(self) -> Holders:
        """The same in arrays of its own."""
        return Holders(*(array.copy() for array in self))


def no_holders(length: np.ndarray, slots: int) -> Holders:
    """Documents that nobody holds yet, with room for `slots` holders each."""
    shape = (len(length), slots)
    count = np.zeros(len(length), dtype=np.int64)
    return Holders(length, count, *(np.zeros(shape, dtype=np.int64) for _ in range(4)))


def find(holders: Holders, document: int, rank: int) -> int:
    """Slot of a rank among the holders of a document, -1 if it holds nothing."""
    for slot in range(holders.number[document]):
        if holders.rank[document, slot] == rank:
            return slot
    return -1


def layout(holders: Holders, document: int, granularity: int) -> None:
    """Find the tails that give every holder its work, to the nearest row; write down the work that results.

    In order, each holder takes a tail from the end of what is left of the document and its other rows from the
    start; the last takes what remains. Moving one of its `rows` from the head to the tail of the interval
    [low, high) adds high - low - rows to its work: one division. What one holder gets too much or too little is
    asked of the next, so that the sum stays.
    """
    last = holders.number[document] - 1
    low, high, owed = 0, holders.length[document], 0
    for slot in range(last):
        rows = holders.rows[document, slot]
        heads_only = rows * low + rows * (rows + 1) // 2
        span = high - low - rows  # > 0: later holders have rows too
        wanted = holders.work[document, slot] + owed
        tail = (wanted - heads_only + span // 2) // span
        if granularity > 1:  # the tail begins on a multiple where the rows allow it
            tail = high - (high - tail + granularity // 2) // granularity * granularity
        tail = min(max(tail, 0), rows)
        work = heads_only + tail * span
        owed = wanted - work
        holders.work[document, slot] = work
        holders.tail[document, slot] = tail
        high -= tail
        low += rows - tail
    holders.tail[document, last] = high - low
    if last > 0:
        holders.work[document, last] = (low + high + 1) * (high - low) // 2


def charge(holders: Holders, document: int, sign: int, multicast: bool, sent: np.ndarray, received: np.ndarray) -> None:
    """Add (sign 1) or take away (-1) what a document makes each rank send and receive under the exact exchange.

    A rank receives the rows below its end that it does not hold. A row of a tail is read by the holders before,
    a head by all others; a holder without a tail ends with its heads and reads only the heads below them.
    With multicast a row leaves its owner once, however many ranks read it.
    """
    last = holders.number[document] - 1
    low, high, tailless = 0, holders.length[document], 0
    for slot in range(last + 1):
        rank = holders.rank[document, slot]
        rows = holders.rows[document, slot]
        tail = holders.tail[document, slot]
        tail_readers, head_readers = slot - tailless, last - tailless
        if multicast:
            tail_readers, head_readers = min(tail_readers, 1), min(head_readers, 1)
        sent[rank] += sign * (tail * tail_readers + (rows - tail) * head_readers)
        if tail > 0:
            received[rank] += sign * (high - rows)
        else:
            received[rank] += sign * low
            tailless += 1
        high -= tail
        low += rows - tail
