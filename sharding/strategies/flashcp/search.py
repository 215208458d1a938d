"""The loops of `flashcp`: a first plan by filling rank after rank, and a local search that improves it.

Two ranks exchange documents and divide one of them anew; the change stays if it is not worse. All of it runs as it
stands, or compiled by numba: whole numbers only. It is one file because numba looks for changes in the file
of the function that it compiles and in no other.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


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


def no_holders(length: np.ndarray, slots: int) -> Holders:
    """Documents that nobody holds yet, with room for `slots` holders each."""
    return Holders(length, np.zeros_like(length), *np.zeros((4, len(length), slots), dtype=np.int64))


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


def put(holders: Holders, document: int, rank: int, rows: int, work: int) -> None:
    slot = holders.number[document]
    holders.rank[document, slot] = rank
    holders.rows[document, slot] = rows
    holders.work[document, slot] = work
    holders.number[document] = slot + 1


def hold(holders: Holders, document: int, rank: int, rows: int, work: int) -> None:
    slot = find(holders, document, rank)
    if slot < 0:
        put(holders, document, rank, rows, work)
    else:
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


class Held(NamedTuple):
    """The documents of each rank, in no order: for picking one, int64."""

    number: np.ndarray  # [ranks]
    document: np.ndarray  # [ranks, documents]
    place: np.ndarray  # [documents, ranks] where a document stands among a rank's


def note(held: Held, document: int, rank: int) -> None:
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
    trial.length[at], trial.number[at] = holders.length[document], 0
    for slot in range(-1, holders.number[document]):
        if (slot == -1 if heads else slot == low) and rows > 0:
            put(trial, at, first, rows, work)
        if slot == high and rows < all_rows:
            put(trial, at, second, all_rows - rows, all_work - work)
        if slot >= 0 and slot != one and slot != two:
            put(trial, at, holders.rank[document, slot], holders.rows[document, slot], holders.work[document, slot])


def propose_moved(holders: Holders, document: int, giver: int, taker: int, trial: Holders, at: int) -> None:
    """Write into trial[at] the document with all that `giver` holds of it on `taker`."""
    gone, old = find(holders, document, giver), find(holders, document, taker)
    trial.length[at], trial.number[at] = holders.length[document], 0
    for slot in range(holders.number[document]):
        rank, rows, work = holders.rank[document, slot], holders.rows[document, slot], holders.work[document, slot]
        if slot == gone:
            rank = taker
            if old >= 0:
                rows += holders.rows[document, old]
                work += holders.work[document, old]
        if slot != old:
            put(trial, at, rank, rows, work)


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


def draw(seed: np.ndarray, below: int) -> int:
    """Next choice from 0 to below - 1 of a linear congruential generator; `seed` [1] is its state."""
    seed[0] = (seed[0] * 1103515245 + 12345) & 0x7FFFFFFF
    return (seed[0] * below) >> 31


def overwork(work: np.ndarray, limit: int) -> int:
    total = 0
    for rank in range(len(work)):
        total += max(0, work[rank] - limit)
    return total


def volume_energy(sent: np.ndarray, received: np.ndarray, weight: int, shift: int) -> int:
    """What the search lowers: the sum over ranks of (volume >> shift) ** 4.

    volume = max(sent, received) + weight / 128 * (sent + received). The fourth power stands for the maximum and
    still rewards relief of the other ranks; the clamp keeps the sum within 63 bits for 2000 ranks.
    """
    energy = 0
    for rank in range(len(sent)):
        volume = max(sent[rank], received[rank]) + (((sent[rank] + received[rank]) * weight) >> 7)
        square = min(volume >> shift, 8191) ** 2
        energy += square * square
    return energy


def improve(
    holders: Holders,
    trial: Holders,
    divisible: int,
    world_size: int,
    moves: int,
    seed: np.ndarray,
    limit: int,
    weight: int,
    max_split: int,
    granularity: int,
    multicast: bool,
) -> tuple[int, int]:
    """Try `moves` changes on `holders`, in place. Returns the work above the limit and the critical rows.

    trial: three documents' worth of scratch. divisible: documents from here on are bundles and stay whole.
    limit: largest work a rank should have. weight: of the mean of sent and received rows, in 1/64.
    """
    documents = len(holders.length)
    work = np.zeros(world_size, dtype=np.int64)
    sent, received = np.zeros_like(work), np.zeros_like(work)
    held = Held(
        np.zeros_like(work),
        np.empty((world_size, documents), dtype=np.int64),
        np.empty((documents, world_size), dtype=np.int64),
    )
    wide = 0  # holders beyond max_split, over all documents
    for document in range(documents):
        layout(holders, document, granularity)
        charge(holders, document, 1, multicast, sent, received)
        wide += max(0, holders.number[document] - max_split)
        for slot in range(holders.number[document]):
            rank = holders.rank[document, slot]
            work[rank] += holders.work[document, slot]
            note(held, document, rank)
    total = work.sum()
    aim = (total + 39 * limit * world_size) // (40 * world_size)  # rounding to rows must not cross the limit
    critical = max(sent.max(), received.max())
    shift = 0
    while critical >> shift >= 1024:
        shift += 1
    excess = overwork(work, limit) + wide * limit
    energy = volume_energy(sent, received, weight, shift)
    new_work, new_sent, new_received = work.copy(), sent.copy(), received.copy()
    changed = np.zeros(3, dtype=np.int64)
    parts = min(max(64 // documents, 1), 8)  # of 32 changes move a part of a document: worth it for few documents
    busiest, hardest = int(np.argmax(np.maximum(sent, received))), int(np.argmax(work))

    for _ in range(moves):
        # Two ranks: half of the time the first is the busiest, or the one with most work while that is too much.
        choice = draw(seed, 4)
        a = draw(seed, world_size)
        if choice >= 2:
            a = busiest
        elif choice == 0 and excess > 0:
            a = hardest
        b = draw(seed, world_size - 1)
        if b >= a:
            b += 1
        if draw(seed, 2) == 0:  # a rank that shares a document with the first
            document = held.document[a, draw(seed, held.number[a])]
            other = holders.rank[document, draw(seed, holders.number[document])]
            if other != a:
                b = other
        if draw(seed, 2) == 0:
            a, b = b, a

        # What moves: nothing, a document or some of its heads from a to b, or one each way. Then one is divided anew.
        giver, taker = a, b
        kind = draw(seed, 32)
        from_a, from_b = -1, -1
        if kind >= 8:
            from_a = held.document[a, draw(seed, held.number[a])]
        if kind >= 16:
            from_b = held.document[b, draw(seed, held.number[b])]
            if from_b == from_a:
                from_b = -1
        cut = documents
        for _ in range(2):  # the longer of two: short ones can seldom make up for what moved
            pick = draw(seed, held.number[a] + held.number[b])
            if pick < held.number[a]:
                cut = min(cut, held.document[a, pick])
            else:
                cut = min(cut, held.document[b, pick - held.number[a]])
        if cut in (from_a, from_b) or cut >= divisible:
            continue

        # Rows of it that a needs for its tokens to stay the same.
        slot_a, slot_b = find(holders, cut, a), find(holders, cut, b)
        need, pool, pool_work, moved, moved_work = 0, 0, 0, 0, 0
        work_a, work_b = work[a], work[b]
        if slot_a >= 0:
            need = holders.rows[cut, slot_a]
            pool, pool_work = need, holders.work[cut, slot_a]
            work_a -= pool_work
        if slot_b >= 0:
            pool += holders.rows[cut, slot_b]
            pool_work += holders.work[cut, slot_b]
            work_b -= holders.work[cut, slot_b]
        if from_a >= 0:
            slot = find(holders, from_a, a)
            moved, moved_work = holders.rows[from_a, slot], holders.work[from_a, slot]
            if kind >= 32 - parts and moved > 1 and from_a < divisible:
                moved = 1 + draw(seed, moved - 1)
                moved_work = min(moved_work, moved * (moved + 1) // 2)
            need += moved
            work_a -= moved_work
            work_b += moved_work
        if from_b >= 0:
            slot = find(holders, from_b, b)
            need -= holders.rows[from_b, slot]
            work_a += holders.work[from_b, slot]
            work_b -= holders.work[from_b, slot]
        if need < 0 or need > pool or (from_a < 0 and (need == 0 or need == pool)):
            continue
        if excess == 0 and (max(work_a, work_b) > limit or work_a + work_b + pool_work > 2 * limit):
            continue

        # Who is nearer to the end, and with how much work: all that fits, now and then less, now and then heads only.
        a_first = draw(seed, 2) == 0
        if slot_a >= 0 and slot_b >= 0:
            a_first = (slot_a < slot_b) != (draw(seed, 4) == 0)
        if not a_first:
            a, b = b, a
            work_a, work_b = work_b, work_a
            need = pool - need
        most, least = aim - work_a, pool_work - (aim - work_b)
        style = draw(seed, 8)
        share = min(most, pool_work) if least <= most else (most + least) // 2
        heads = style < 3 and least <= 0 and 0 < need < pool
        if heads:
            share = 0
        elif style > 5 and least < share:
            share -= (share - max(least, 0)) * draw(seed, 64) // 64
        if need == 0 or need == pool:
            share = pool_work if need else 0
        propose_split(holders, cut, a, b, need, share, heads, trial, 0)
        changed[0] = cut
        changes = 1
        if from_a >= 0:
            slot = find(holders, from_a, giver)
            if moved == holders.rows[from_a, slot]:
                propose_moved(holders, from_a, giver, taker, trial, changes)
            else:
                slot = find(holders, from_a, taker)
                if slot >= 0:
                    moved += holders.rows[from_a, slot]
                    moved_work += holders.work[from_a, slot]
                propose_split(holders, from_a, taker, giver, moved, moved_work, slot < 0, trial, changes)
            changed[changes] = from_a
            changes += 1
        if from_b >= 0:
            propose_moved(holders, from_b, taker, giver, trial, changes)
            changed[changes] = from_b
            changes += 1

        new_work[:] = work
        new_wide = wide
        for i in range(changes):
            document = changed[i]
            layout(trial, i, granularity)
            for slot in range(holders.number[document]):
                new_work[holders.rank[document, slot]] -= holders.work[document, slot]
            for slot in range(trial.number[i]):
                new_work[trial.rank[i, slot]] += trial.work[i, slot]
            new_wide += max(0, trial.number[i] - max_split) - max(0, holders.number[document] - max_split)
        new_excess = overwork(new_work, limit) + new_wide * limit
        if new_excess > excess:
            continue
        new_sent[:] = sent
        new_received[:] = received
        for i in range(changes):
            charge(holders, changed[i], -1, multicast, new_sent, new_received)
            charge(trial, i, 1, multicast, new_sent, new_received)
        new_energy = volume_energy(new_sent, new_received, weight, shift)
        if new_excess == excess and new_energy > energy:
            continue

        excess, energy, wide = new_excess, new_energy, new_wide
        work, new_work = new_work, work
        sent, new_sent = new_sent, sent
        received, new_received = new_received, received
        busiest, hardest = int(np.argmax(np.maximum(sent, received))), int(np.argmax(work))
        for i in range(changes):
            adopt(holders, changed[i], trial, i, (a, b), held)
    return excess, max(sent.max(), received.max())


HELPERS = (
    *(find, layout, charge, put, hold, note),
    *(propose_split, propose_moved, adopt, draw, overwork, volume_energy),
)
"""What `fill` and `improve` call."""
