"""Local search: two ranks exchange documents and divide one of them anew; the change stays if it is not worse.

The functions run as they stand, or compiled by numba (`compiled`): whole numbers only, no calls out of this file.
"""

from __future__ import annotations

import numpy as np

from flashcp.sharding.strategies.flashcp.state import Holders

__all__ = ["charge", "draw", "find", "improve", "layout", "measure", "propose_moved", "propose_split"]


def draw(seed: np.ndarray, below: int) -> int:
    """Next choice from 0 to below - 1 of a linear congruential generator; `seed` [1] is its state."""
    seed[0] = (seed[0] * 1103515245 + 12345) & 0x7FFFFFFF
    return (seed[0] * below) >> 31


def find(holders: Holders, document: int, rank: int) -> int:
    """Slot of a rank among the holders of a document, -1 if it holds nothing."""
    for slot in range(holders.count[document]):
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
    last = holders.count[document] - 1
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


def charge(
    holders: Holders, document: int, sign: int, multicast: bool, sent: np.ndarray, received: np.ndarray
) -> None:
    """Add (sign 1) or take away (-1) what a document makes each rank send and receive under the exact exchange.

    A rank receives the rows below its end that it does not hold. A row of a tail is read by the holders before,
    a head by all others; a holder without a tail ends with its heads and reads only the heads below them.
    With multicast a row leaves its owner once, however many ranks read it.
    """
    last = holders.count[document] - 1
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


def measure(
    work: np.ndarray, sent: np.ndarray, received: np.ndarray, limit: int, weight: int, shift: int
) -> tuple[int, int]:
    """Work above the limit, summed, and the energy: the sum over ranks of (volume >> shift) ** 4.

    volume = max(sent, received) + weight / 128 * (sent + received). The fourth power stands for the maximum and
    still rewards relief of the other ranks; the clamp keeps it inside 63 bits for 2000 ranks.
    """
    excess, energy = 0, 0
    for rank in range(len(work)):
        excess += max(0, work[rank] - limit)
        volume = max(sent[rank], received[rank]) + (((sent[rank] + received[rank]) * weight) >> 7)
        square = min(volume >> shift, 8191) ** 2
        energy += square * square
    return excess, energy


def propose_split(
    holders: Holders, document: int, first: int, second: int, rows: int, work: int, heads: bool, trial: Holders
) -> None:
    """Write into trial[0] the document with `rows` and `work` of what two ranks hold of it on `first`, the rest
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
    for slot in range(-1, holders.count[document]):
        if (slot == -1 if heads else slot == low) and rows > 0:
            trial.rank[0, count], trial.rows[0, count], trial.work[0, count] = first, rows, work
            count += 1
        if slot == high and rows < all_rows:
            trial.rank[0, count], trial.rows[0, count], trial.work[0, count] = second, all_rows - rows, all_work - work
            count += 1
        if slot >= 0 and slot != one and slot != two:
            trial.rank[0, count] = holders.rank[document, slot]
            trial.rows[0, count] = holders.rows[document, slot]
            trial.work[0, count] = holders.work[document, slot]
            count += 1
    trial.count[0] = count
    trial.length[0] = holders.length[document]


def propose_moved(holders: Holders, document: int, giver: int, taker: int, trial: Holders, at: int) -> None:
    """Write into trial[at] the document with all that `giver` holds of it on `taker`."""
    gone, old = find(holders, document, giver), find(holders, document, taker)
    count = 0
    for slot in range(holders.count[document]):
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
    trial.count[at] = count
    trial.length[at] = holders.length[document]


def improve(
    holders: Holders,
    trial: Holders,
    divisible: int,
    world_size: int,
    limit: int,
    moves: int,
    seed: np.ndarray,
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
    held = np.zeros((world_size, documents), dtype=np.int64)  # documents of each rank, in no order
    held_count = np.zeros_like(work)
    place = np.full((documents, world_size), -1, dtype=np.int64)  # where a document stands among a rank's
    wide = 0  # holders beyond max_split, over all documents
    for document in range(documents):
        layout(holders, document, granularity)
        charge(holders, document, 1, multicast, sent, received)
        wide += max(0, holders.count[document] - max_split)
        for slot in range(holders.count[document]):
            rank = holders.rank[document, slot]
            work[rank] += holders.work[document, slot]
            place[document, rank] = held_count[rank]
            held[rank, held_count[rank]] = document
            held_count[rank] += 1
    total = work.sum()
    aim = (total + 9 * limit * world_size) // (10 * world_size)  # rounding to rows must not cross the limit
    critical = max(sent.max(), received.max())
    shift = 0
    while critical >> shift >= 1024:
        shift += 1
    excess, energy = measure(work, sent, received, limit, weight, shift)
    excess += wide * limit
    new_work, new_sent, new_received = work.copy(), sent.copy(), received.copy()
    changed = np.zeros(3, dtype=np.int64)

    for _ in range(moves):
        # Two ranks: half of the time the first is the critical one, or the one with most work while that is too much.
        choice = draw(seed, 4)
        a = 0
        if choice == 0 and excess > 0:
            for rank in range(world_size):
                if work[rank] > work[a]:
                    a = rank
        elif choice >= 2:
            for rank in range(world_size):
                if max(sent[rank], received[rank]) > max(sent[a], received[a]):
                    a = rank
        else:
            a = draw(seed, world_size)
        b = draw(seed, world_size - 1)
        if b >= a:
            b += 1
        if draw(seed, 2) == 0:  # a rank that shares a document with the first
            document = held[a, draw(seed, held_count[a])]
            other = holders.rank[document, draw(seed, holders.count[document])]
            if other != a:
                b = other
        if draw(seed, 2) == 0:
            a, b = b, a

        # What moves: nothing, a document from a to b, or one each way. Then one more is divided anew.
        kind = draw(seed, 4)
        from_a, from_b = -1, -1
        if kind >= 1:
            from_a = held[a, draw(seed, held_count[a])]
        if kind >= 2:
            from_b = held[b, draw(seed, held_count[b])]
            if from_b == from_a:
                from_b = -1
        cut = documents
        for _ in range(3):  # the longest of three: short ones can seldom make up for what moved
            pick = draw(seed, held_count[a] + held_count[b])
            cut = min(cut, held[a, pick] if pick < held_count[a] else held[b, pick - held_count[a]])
        if cut == from_a or cut == from_b or cut >= divisible:
            continue

        # Rows of it that a needs for its tokens to stay the same.
        slot_a, slot_b = find(holders, cut, a), find(holders, cut, b)
        need, pool, pool_work = 0, 0, 0
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
            need += holders.rows[from_a, slot]
            work_a -= holders.work[from_a, slot]
            work_b += holders.work[from_a, slot]
        if from_b >= 0:
            slot = find(holders, from_b, b)
            need -= holders.rows[from_b, slot]
            work_a += holders.work[from_b, slot]
            work_b -= holders.work[from_b, slot]
        if need < 0 or need > pool or (from_a < 0 and (need == 0 or need == pool)):
            continue

        # Who is nearer to the end, and with how much work: all that fits, now and then less, now and then heads only.
        a_first = draw(seed, 2) == 0
        if slot_a >= 0 and slot_b >= 0:
            a_first = (slot_a < slot_b) != (draw(seed, 4) == 0)
        if not a_first:
            a, b = b, a
            work_a, work_b = work_b, work_a
            from_a, from_b = from_b, from_a
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
        propose_split(holders, cut, a, b, need, share, heads, trial)
        changed[0] = cut
        changes = 1
        if from_a >= 0:
            propose_moved(holders, from_a, a, b, trial, changes)
            changed[changes] = from_a
            changes += 1
        if from_b >= 0:
            propose_moved(holders, from_b, b, a, trial, changes)
            changed[changes] = from_b
            changes += 1

        new_work[:], new_sent[:], new_received[:] = work, sent, received
        new_wide = wide
        for i in range(changes):
            document = changed[i]
            charge(holders, document, -1, multicast, new_sent, new_received)
            for slot in range(holders.count[document]):
                new_work[holders.rank[document, slot]] -= holders.work[document, slot]
            layout(trial, i, granularity)
            charge(trial, i, 1, multicast, new_sent, new_received)
            for slot in range(trial.count[i]):
                new_work[trial.rank[i, slot]] += trial.work[i, slot]
            new_wide += max(0, trial.count[i] - max_split) - max(0, holders.count[document] - max_split)
        new_excess, new_energy = measure(new_work, new_sent, new_received, limit, weight, shift)
        new_excess += new_wide * limit
        if new_excess > excess or (new_excess == excess and new_energy > energy):
            continue

        excess, energy, wide = new_excess, new_energy, new_wide
        work, new_work = new_work, work
        sent, new_sent = new_sent, sent
        received, new_received = new_received, received
        for i in range(changes):
            document = changed[i]
            for rank in (a, b):
                if find(holders, document, rank) >= 0 and find(trial, i, rank) < 0:
                    held_count[rank] -= 1
                    mover = held[rank, held_count[rank]]
                    held[rank, place[document, rank]] = mover
                    place[mover, rank] = place[document, rank]
                elif find(holders, document, rank) < 0 and find(trial, i, rank) >= 0:
                    place[document, rank] = held_count[rank]
                    held[rank, held_count[rank]] = document
                    held_count[rank] += 1
            count = trial.count[i]
            holders.count[document] = count
            holders.rank[document, :count] = trial.rank[i, :count]
            holders.rows[document, :count] = trial.rows[i, :count]
            holders.work[document, :count] = trial.work[i, :count]
            holders.tail[document, :count] = trial.tail[i, :count]
    return excess, max(sent.max(), received.max())
