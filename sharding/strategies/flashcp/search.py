"""Local search: two ranks exchange documents and divide one of them anew; the change stays if it is not worse.

The functions run as they stand, or compiled by numba (`compiled`): whole numbers only.
"""

from __future__ import annotations

import numpy as np

from flashcp.sharding.strategies.flashcp.changes import Held, adopt, note, propose_moved, propose_split
from flashcp.sharding.strategies.flashcp.state import Holders, charge, find, layout

__all__ = ["draw", "improve", "overwork", "volume_energy"]


def draw(seed: np.ndarray, below: int) -> int:
    """Next choice from 0 to below - 1 of a linear congruential generator; `seed` [1] is its state."""
    seed[0] = (seed[0] * 1103515245 + 12345) & 0x7FFFFFFF
    return (seed[0] * below) >> 31


def overwork(work: np.ndarray, limit: int) -> int:
    """Work above the limit, summed over the ranks."""
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
