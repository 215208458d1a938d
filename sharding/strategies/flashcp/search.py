"""The local search of `flashcp` that improves a first plan.

Two ranks exchange documents and divide one of them anew; the change stays if it is not worse. All of it runs as it
stands, or compiled by numba: whole numbers only.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flashcp.sharding.strategies.flashcp.density import Density, below
from flashcp.sharding.strategies.flashcp.state import Holders, charge, find, layout


def put(holders: Holders, document: int, rank: int, rows: int, work: int) -> None:
    slot = holders.number[document]
    holders.rank[slot, document] = rank
    holders.rows[slot, document] = rows
    holders.work[slot, document] = work
    holders.number[document] = slot + 1


class Held(NamedTuple):
    """The documents of each rank, in no order: for picking one, int64."""

    number: np.ndarray  # [ranks]
    document: np.ndarray  # [ranks, documents]


def note(held: Held, document: int, rank: int) -> None:
    held.document[rank, held.number[rank]] = document
    held.number[rank] += 1


def forget(held: Held, document: int, rank: int) -> None:
    held.number[rank] -= 1
    place = 0
    while held.document[rank, place] != document:
        place += 1
    held.document[rank, place] = held.document[rank, held.number[rank]]


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
            all_rows += holders.rows[slot, document]
            all_work += holders.work[slot, document]
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
            put(trial, at, holders.rank[slot, document], holders.rows[slot, document], holders.work[slot, document])


def propose_moved(holders: Holders, document: int, giver: int, taker: int, trial: Holders, at: int) -> None:
    """Write into trial[at] the document with all that `giver` holds of it on `taker`."""
    gone, old = find(holders, document, giver), find(holders, document, taker)
    trial.length[at], trial.number[at] = holders.length[document], 0
    for slot in range(holders.number[document]):
        rank, rows, work = holders.rank[slot, document], holders.rows[slot, document], holders.work[slot, document]
        if slot == gone:
            rank = taker
            if old >= 0:
                rows += holders.rows[old, document]
                work += holders.work[old, document]
        if slot != old:
            put(trial, at, rank, rows, work)


def adopt(holders: Holders, document: int, trial: Holders, at: int, ranks: tuple[int, int], held: Held) -> None:
    """Make trial[at] the holders of a document; of the ranks, only two can have come or gone."""
    for rank in ranks:
        before, after = find(holders, document, rank) >= 0, find(trial, at, rank) >= 0
        if before and not after:
            forget(held, document, rank)
        elif after and not before:
            note(held, document, rank)
    count = trial.number[at]
    holders.number[document] = count
    holders.rank[:count, document] = trial.rank[:count, at]
    holders.rows[:count, document] = trial.rows[:count, at]
    holders.work[:count, document] = trial.work[:count, at]
    holders.tail[:count, document] = trial.tail[:count, at]


def draw(seed: np.ndarray, below: int) -> int:
    """Next choice from 0 to below - 1 of a linear congruential generator; `seed` [1] is its state."""
    seed[0] = (seed[0] * 1103515245 + 12345) & 0x7FFFFFFF
    return (seed[0] * below) >> 31


class Loads(NamedTuple):
    """What each rank has to do, int64 [ranks]."""

    work: np.ndarray
    sent: np.ndarray
    received: np.ndarray


def energy_of(loads: Loads, rank: int, weight: int, shift: int) -> int:
    """A rank's share of what the search lowers: (volume >> shift) ** 4.

    volume = max(sent, received) + weight / 128 * (sent + received). The fourth power stands for the maximum and
    still rewards relief of the other ranks; the clamp keeps the sum within 63 bits for 2000 ranks.
    """
    sent, received = loads.sent[rank], loads.received[rank]
    square = min((max(sent, received) + (((sent + received) * weight) >> 7)) >> shift, 8191) ** 2
    return square * square


def weigh(holders: Holders, document: int, sign: int, work: np.ndarray) -> None:
    """Add (sign 1) or take away (-1) the work that a document gives its holders."""
    for slot in range(holders.number[document]):
        work[holders.rank[slot, document]] += sign * holders.work[slot, document]


class Touched(NamedTuple):
    """The ranks whose loads a change alters, int64 [ranks] each; `before` is what the loads were."""

    mark: np.ndarray  # 1 where a rank is among them
    rank: np.ndarray
    before: Loads


def touch(touched: Touched, count: int, loads: Loads, holders: Holders, document: int) -> int:
    """Add the holders of a document to the first `count` ranks touched. Returns how many there are."""
    for slot in range(holders.number[document]):
        rank = holders.rank[slot, document]
        if touched.mark[rank] == 0:
            touched.mark[rank] = 1
            touched.rank[count] = rank
            touched.before.work[count] = loads.work[rank]
            touched.before.sent[count] = loads.sent[rank]
            touched.before.received[count] = loads.received[rank]
            count += 1
    return count


def worst(loads: Loads) -> tuple[int, int]:
    """The rank that sends or receives most, and the one with most work; the first of equals."""
    busiest, hardest, most = 0, 0, -1
    for rank in range(len(loads.work)):
        volume = max(loads.sent[rank], loads.received[rank])
        if volume > most:
            busiest, most = rank, volume
        if loads.work[rank] > loads.work[hardest]:
            hardest = rank
    return busiest, hardest


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
    density: Density | None,
) -> tuple[int, int]:
    """Try `moves` changes on `holders`, in place. Returns the work above the limit and the critical rows.

    trial: three documents' worth of scratch. divisible: documents from here on are bundles and stay whole.
    limit: largest work a rank should have. weight: of the mean of sent and received rows, in 1/64.
    density: of the documents that are no bundles; None: causal.
    """
    documents = len(holders.length)
    number = np.zeros(world_size, dtype=np.int64)
    loads = Loads(number.copy(), number.copy(), number.copy())
    work = loads.work
    touched = Touched(number.copy(), number.copy(), Loads(number.copy(), number.copy(), number.copy()))
    held = Held(number, np.empty((world_size, documents), dtype=np.int64))
    wide = 0  # holders beyond max_split, over all documents
    for document in range(documents):
        layout(holders, document, document, granularity, density)
        weigh(holders, document, 1, work)
        charge(holders, document, document, 1, multicast, density, loads.sent, loads.received)
        wide += max(0, holders.number[document] - max_split)
        for slot in range(holders.number[document]):
            note(held, document, holders.rank[slot, document])
    aim = (work.sum() + 39 * limit * world_size) // (40 * world_size)  # rounding to rows must not cross the limit
    busiest, hardest = worst(loads)
    critical = max(loads.sent[busiest], loads.received[busiest])
    shift = 0
    while critical >> shift >= 1024:
        shift += 1
    excess, energy = wide * limit, 0
    for rank in range(world_size):
        excess += max(0, work[rank] - limit)
        energy += energy_of(loads, rank, weight, shift)
    changed = np.zeros(3, dtype=np.int64)
    parts = min(max(64 // documents, 1), 8)  # of 32 changes move a part of a document: worth it for few documents

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
            other = holders.rank[draw(seed, holders.number[document]), document]
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
            need = holders.rows[slot_a, cut]
            pool, pool_work = need, holders.work[slot_a, cut]
            work_a -= pool_work
        if slot_b >= 0:
            pool += holders.rows[slot_b, cut]
            pool_work += holders.work[slot_b, cut]
            work_b -= holders.work[slot_b, cut]
        if from_a >= 0:
            slot = find(holders, from_a, a)
            moved, moved_work = holders.rows[slot, from_a], holders.work[slot, from_a]
            if kind >= 32 - parts and moved > 1 and from_a < divisible:
                moved = 1 + draw(seed, moved - 1)
                if density is None:
                    moved_work = min(moved_work, moved * (moved + 1) // 2)
                else:
                    moved_work = min(moved_work, below(density, from_a, moved))
            need += moved
            work_a -= moved_work
            work_b += moved_work
        if from_b >= 0:
            slot = find(holders, from_b, b)
            need -= holders.rows[slot, from_b]
            work_a += holders.work[slot, from_b]
            work_b -= holders.work[slot, from_b]
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
            if moved == holders.rows[slot, from_a]:
                propose_moved(holders, from_a, giver, taker, trial, changes)
            else:
                slot = find(holders, from_a, taker)
                if slot >= 0:
                    moved += holders.rows[slot, from_a]
                    moved_work += holders.work[slot, from_a]
                propose_split(holders, from_a, taker, giver, moved, moved_work, slot < 0, trial, changes)
            changed[changes] = from_a
            changes += 1
        if from_b >= 0:
            propose_moved(holders, from_b, taker, giver, trial, changes)
            changed[changes] = from_b
            changes += 1

        # Only the ranks that hold a changed document have other loads then.
        count, new_wide = 0, wide
        for i in range(changes):
            layout(trial, i, changed[i], granularity, density)
            count = touch(touched, count, loads, holders, changed[i])
            count = touch(touched, count, loads, trial, i)
            new_wide += max(0, trial.number[i] - max_split) - max(0, holders.number[changed[i]] - max_split)
        new_excess = excess + (new_wide - wide) * limit
        for i in range(changes):
            weigh(holders, changed[i], -1, work)
            weigh(trial, i, 1, work)
        for i in range(count):
            rank = touched.rank[i]
            touched.mark[rank] = 0
            new_excess += max(0, work[rank] - limit) - max(0, touched.before.work[i] - limit)
        if new_excess > excess:
            for i in range(count):
                work[touched.rank[i]] = touched.before.work[i]
            continue
        new_energy = energy
        for i in range(count):
            new_energy -= energy_of(loads, touched.rank[i], weight, shift)
        for i in range(changes):
            charge(holders, changed[i], changed[i], -1, multicast, density, loads.sent, loads.received)
            charge(trial, i, changed[i], 1, multicast, density, loads.sent, loads.received)
        for i in range(count):
            new_energy += energy_of(loads, touched.rank[i], weight, shift)
        if new_excess == excess and new_energy > energy:
            for i in range(count):
                rank = touched.rank[i]
                work[rank] = touched.before.work[i]
                loads.sent[rank] = touched.before.sent[i]
                loads.received[rank] = touched.before.received[i]
            continue

        excess, energy, wide = new_excess, new_energy, new_wide
        busiest, hardest = worst(loads)
        for i in range(changes):
            adopt(holders, changed[i], trial, i, (a, b), held)
    return excess, max(loads.sent[busiest], loads.received[busiest])


HELPERS = (put, note, forget, propose_split, propose_moved, adopt, draw, energy_of, weigh, touch, worst)
"""What `improve` calls in this file."""
