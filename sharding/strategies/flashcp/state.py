"""Who holds how much of each document, the pieces that follow, and what they make each rank send and receive.

All of it runs as it stands, or compiled by numba: whole numbers only. No density is causal attention, in closed form:
numba compiles that apart, without a trace of the other.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flashcp.sharding.strategies.flashcp.density import PREFIX, SIZES, Density, below, snap, split


class Holders(NamedTuple):
    """Who holds how much of each document, int64. Documents are sorted, longest first; bundles come last.

    A bundle is several whole short documents that move together; its length is their tokens.
    The pieces follow from the holders' order (`layout`). Few documents have many holders, and those are the first:
    with slots outermost only the beginning of most pages is ever touched, or none of them.
    """

    length: np.ndarray  # [documents]
    number: np.ndarray  # [documents] holders of each
    rank: np.ndarray  # [slots, documents] the holders, in the order in which they take their tails
    rows: np.ndarray  # [slots, documents]
    work: np.ndarray  # [slots, documents]
    tail: np.ndarray  # [slots, documents] rows taken from the end; the others are taken from the start


def no_holders(length: np.ndarray, slots: int) -> Holders:
    """Documents that nobody holds yet, with room for `slots` holders each."""
    return Holders(length, np.zeros_like(length), *np.zeros((4, slots, len(length)), dtype=np.int64))


def find(holders: Holders, document: int, rank: int) -> int:
    """Slot of a rank among the holders of a document, -1 if it holds nothing."""
    for slot in range(holders.number[document]):
        if holders.rank[slot, document] == rank:
            return slot
    return -1


def layout(holders: Holders, at: int, document: int, granularity: int, density: Density | None) -> None:
    """Find the tails that give every holder its work, to the nearest row; write down the work that results.

    at: where `holders` has the document. In order, each holder takes a tail from the end of what is left of the
    document and its other rows from the start; the last takes what remains. What one holder gets too much or too
    little is asked of the next, so that the sum stays.
    """
    if density is None:
        layout_causal(holders, at, granularity)
    elif holders.number[at] == 1:
        holders.tail[0, at] = holders.length[at]
    elif density.document[document, PREFIX] == holders.length[at]:
        layout_full(holders, at, density.layers.sum() * holders.length[at], granularity)
    else:
        layout_mix(holders, at, document, granularity, density)


def layout_causal(holders: Holders, at: int, granularity: int) -> None:
    """Moving one of a holder's `rows` from the head to the tail of the interval [low, high) adds high - low - rows to
    its work: one division."""
    last = holders.number[at] - 1
    low, high, owed = 0, holders.length[at], 0
    for slot in range(last):
        rows = holders.rows[slot, at]
        heads_only = rows * low + rows * (rows + 1) // 2
        span = high - low - rows  # > 0: later holders have rows too
        wanted = holders.work[slot, at] + owed
        tail = (wanted - heads_only + span // 2) // span
        if granularity > 1:  # the tail begins on a multiple where the rows allow it
            tail = high - (high - tail + granularity // 2) // granularity * granularity
        tail = min(max(tail, 0), rows)
        work = heads_only + tail * span
        owed = wanted - work
        holders.work[slot, at] = work
        holders.tail[slot, at] = tail
        high -= tail
        low += rows - tail
    holders.tail[last, at] = high - low
    if last > 0:
        holders.work[last, at] = (low + high + 1) * (high - low) // 2


def layout_full(holders: Holders, at: int, row_work: int, granularity: int) -> None:
    """Of a document whose rows all see each other: what is taken from where changes no work."""
    last = holders.number[at] - 1
    low, high, owed = 0, holders.length[at], 0
    for slot in range(last):
        rows = holders.rows[slot, at]
        wanted = holders.work[slot, at] + owed
        work = rows * row_work
        tail = rows if wanted >= work else 0
        if granularity > 1:
            tail = min(max(high - (high - tail + granularity // 2) // granularity * granularity, 0), rows)
        owed = wanted - work
        holders.work[slot, at] = work
        holders.tail[slot, at] = tail
        high -= tail
        low += rows - tail
    holders.tail[last, at] = high - low
    holders.work[last, at] = (high - low) * row_work


def layout_mix(holders: Holders, at: int, document: int, granularity: int, density: Density) -> None:
    """The same for any density; no tail begins inside a block that is kept whole, as far as its holder's rows allow."""
    last = holders.number[at] - 1
    low, high, owed = 0, holders.length[at], 0
    below_low, below_high = 0, below(density, document, high)
    for slot in range(last):
        rows = holders.rows[slot, at]
        wanted = holders.work[slot, at] + owed
        tail = split(density, document, low, high, rows, wanted, below_low, below_high)
        if granularity > 1:
            tail = high - (high - tail + granularity // 2) // granularity * granularity
        tail = snap(density, document, high, rows, min(max(tail, 0), rows))
        high -= tail
        low += rows - tail
        new_low, new_high = below(density, document, low), below(density, document, high)
        work = new_low - below_low + below_high - new_high
        below_low, below_high = new_low, new_high
        owed = wanted - work
        holders.work[slot, at] = work
        holders.tail[slot, at] = tail
    holders.tail[last, at] = high - low
    holders.work[last, at] = below_high - below_low


def charge(
    holders: Holders,
    at: int,
    document: int,
    sign: int,
    multicast: bool,
    density: Density | None,
    sent: np.ndarray,
    received: np.ndarray,
) -> None:
    """Add (sign 1) or take away (-1) what a document makes each rank send and receive under the exact exchange.

    With a layer mix rows count once for each layer that reads them. With multicast a row leaves its owner once,
    however many ranks read it.
    """
    if holders.number[at] == 1:
        return
    if density is None:
        charge_ends(holders, at, sign, multicast, sent, received)
    elif density.document[document, PREFIX] == holders.length[at]:
        charge_full(holders, at, sign * density.layers.sum(), multicast, sent, received)
    else:
        layers = charge_halos(holders, at, document, sign, density, sent, received)
        if layers > 0:
            charge_ends(holders, at, sign * layers, multicast, sent, received)


def charge_ends(holders: Holders, at: int, times: int, multicast: bool, sent: np.ndarray, received: np.ndarray) -> None:
    """Of layers that look back to the document's start. A rank receives the rows below its end that it does not hold.

    A row of a tail is read by the holders before, a head by all others; a holder without a tail ends with its heads
    and reads only the heads below them.
    """
    last = holders.number[at] - 1
    low, high, tailless = 0, holders.length[at], 0
    for slot in range(last + 1):
        rank = holders.rank[slot, at]
        rows = holders.rows[slot, at]
        tail = holders.tail[slot, at]
        tail_readers, head_readers = slot - tailless, last - tailless
        if multicast:
            tail_readers, head_readers = min(tail_readers, 1), min(head_readers, 1)
        sent[rank] += times * (tail * tail_readers + (rows - tail) * head_readers)
        if tail > 0:
            received[rank] += times * (high - rows)
        else:
            received[rank] += times * low
            tailless += 1
        high -= tail
        low += rows - tail


def charge_full(holders: Holders, at: int, times: int, multicast: bool, sent: np.ndarray, received: np.ndarray) -> None:
    """Of a document whose rows all see each other: every holder reads all."""
    others = 1 if multicast else holders.number[at] - 1
    for slot in range(holders.number[at]):
        rank, rows = holders.rank[slot, at], holders.rows[slot, at]
        sent[rank] += times * rows * others
        received[rank] += times * (holders.length[at] - rows)


def charge_halos(
    holders: Holders, at: int, document: int, sign: int, density: Density, sent: np.ndarray, received: np.ndarray
) -> int:
    """What layers read that look back over a window or a chunk, and what a block from the document's start adds.

    Returns how many layers look back to the start. A row that two pieces of one rank read counts twice: rare, for
    pieces are longer than windows. Cuts inside other blocks are left out: there should be none.
    """
    last = holders.number[at] - 1
    prefix, to_start, all_layers = density.document[document, PREFIX], 0, 0
    # In the order of rows: heads of slots 0 .. last - 1, all of the last one's, tails of last - 1 .. 0.
    for kind in range(len(density.layers)):
        layers = density.layers[kind]
        all_layers += layers
        window, chunk = density.document[document, SIZES + 2 * kind], density.document[document, SIZES + 2 * kind + 1]
        if chunk == 0 and window > holders.length[at]:
            to_start += layers
            continue
        start, nearest, owner = 0, 0, 0  # the piece before: its rows, its rank
        for piece in range(2 * last + 1):
            rows = piece_rows(holders, at, piece)
            if rows == 0:
                continue
            rank = holders.rank[min(piece, 2 * last - piece), at]
            reach = min(window - 1, start)
            if chunk > 0:
                reach = min(reach, start % chunk)
            if start < prefix:
                reach = start
            if reach <= nearest:
                sent[owner] += sign * layers * reach
                received[rank] += sign * layers * reach
            else:
                walk(holders, at, piece, -1, reach, rank, sign * layers, sent, received)
            start += rows
            nearest, owner = rows, rank
    start = 0
    for piece in range(2 * last + 1 if prefix > 0 else 0):
        rows = piece_rows(holders, at, piece)
        slot = min(piece, 2 * last - piece)
        if rows > 0 and start + rows < prefix:
            times = all_layers
            if holders.tail[slot, at] > 0 and piece < last:  # its tail reads all below it anyhow
                times -= to_start
            walk(holders, at, piece, 1, prefix - start - rows, holders.rank[slot, at], sign * times, sent, received)
        start += rows
    return to_start


def piece_rows(holders: Holders, at: int, piece: int) -> int:
    """Rows of a piece of a document, in the order of rows."""
    last = holders.number[at] - 1
    if piece < last:
        return holders.rows[piece, at] - holders.tail[piece, at]
    return holders.tail[2 * last - piece, at]


def walk(
    holders: Holders,
    at: int,
    piece: int,
    step: int,
    reach: int,
    reader: int,
    times: int,
    sent: np.ndarray,
    received: np.ndarray,
) -> None:
    """Charge a rank that reads `reach` rows beside a piece, before it (step -1) or behind it (1)."""
    last = holders.number[at] - 1
    while reach > 0:
        piece += step
        rows = min(reach, piece_rows(holders, at, piece))
        owner = holders.rank[min(piece, 2 * last - piece), at]
        if owner != reader:
            sent[owner] += times * rows
            received[reader] += times * rows
        reach -= rows


HELPERS = (
    *(find, layout, layout_causal, layout_full, layout_mix, charge, charge_ends, charge_full, charge_halos),
    *(piece_rows, walk),
)
"""What the search calls."""
