"""`flashcp`: equal tokens, work within a tolerance, and as few KV rows on the busiest rank as a search finds.

The algorithm, with its derivations and a worked example, is in docs/planner.md: `fill` makes a first plan that is
exact in tokens and work, `improve` searches from there (both compiled by numba when the window is big), `blocks` keeps
bidirectional blocks whole, `members` compares with the plans of the other strategies.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from flashcp.sharding.bounds import FEW_ROWS, TOLERANCE, least_largest_work
from flashcp.sharding.compiled import compiled_twins
from flashcp.sharding.documents import MOST_RANKS, MOST_TOKENS, sum_by
from flashcp.sharding.exchanges import rows_of_layers
from flashcp.sharding.masks import Workload, read_workload
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.shards import ShardTable
from flashcp.sharding.strategies.equal_pieces import contiguous
from flashcp.sharding.strategies.flashcp.blocks import cut_blocks, keep_blocks_whole, kept_blocks
from flashcp.sharding.strategies.flashcp.density import HELPERS as COUNTING
from flashcp.sharding.strategies.flashcp.density import density_of
from flashcp.sharding.strategies.flashcp.fill import HELPERS as FILLING
from flashcp.sharding.strategies.flashcp.fill import fill, fill_mix
from flashcp.sharding.strategies.flashcp.members import best_member, largest_work, members
from flashcp.sharding.strategies.flashcp.rows import exchange_rows
from flashcp.sharding.strategies.flashcp.search import HELPERS as SEARCHING
from flashcp.sharding.strategies.flashcp.search import improve
from flashcp.sharding.strategies.flashcp.state import HELPERS as HOLDING
from flashcp.sharding.strategies.flashcp.state import Holders, no_holders
from flashcp.sharding.values import read_flag, read_number, read_whole, shown

__all__ = ["Cost", "flashcp"]

Cost = Callable[[ShardingPlan], float]
"""A plan's predicted time, in any unit."""

SMALL_WINDOW = 4096  # tokens up to which the loops run uncompiled: numba takes longer to import than they take
STARTS = 8  # searches that begin; the better half goes on, until one is left
MANY = 2**17  # documents times ranks above which two searches have all changes: eight would have too few each
MOST_CHANGES = 10**9  # a budget beyond it would search for an hour
LEAST_MOVES = 4000  # of a search that begins
EXTENSIONS = 4  # more rounds for a plan that is not yet within the tolerance
SEED = 12345
CLEARLY = 1e-3  # faster by less is as fast: ranks whose sums round differently take the same plan
SLACKS = 0.25, 4.0  # of the tolerance, in other plans that a cost chooses among


def flashcp(
    document_lengths: np.ndarray,
    world_size: int,
    *,
    tolerance: float = TOLERANCE,
    budget: int | None = None,
    total_weight: float = 1 / 16,
    granularity: int = 1,
    max_split: int | None = None,
    multicast: bool = False,
    cost: Cost | None = None,
    workload: Workload | None = None,
) -> ShardTable:
    """Plan a window: first imbalance within the tolerance, then critical rows of the exact exchange.

    tolerance: imbalance (largest work over mean) that is as good as balance.
    budget: changes to try; None is 400 up to 4,096 tokens, 44,000 + 250 per rank above, 200,000 + 250 where documents
        times ranks exceed 2^17; half of that with masks or a mix, where a change takes longer.
    total_weight: critical rows that one row less on average over the ranks is worth, to the search.
    granularity: tails begin on multiples of this many rows; heads, which equalise tokens to the row, do not.
    max_split: ranks that one document may be on, where the tolerance allows it; None for all.
    multicast: count a row that several ranks read as sent once (a relay or multicast sends it on).
    cost: chooses among the plan that there is without it, those of a tighter and a looser tolerance, and, without
        granularity, max_split and multicast, the other strategies': none of those that cut no more bidirectional blocks
        is faster by more than 0.1%, as it predicts.
    workload: masks and layer mix; work and rows are then those of all layers together. None is causal.

    The same input gives the same plan on any machine: whole numbers, budgets in changes, choices from a fixed seed.
    Raises ValueError for options out of range, and for a cost that is no finite number.
    """
    tolerance = min(read_number("tolerance", tolerance, lambda number: number >= 1, "a number >= 1"), float(MOST_RANKS))
    if budget is not None:
        budget = read_whole("budget", budget, 0, MOST_CHANGES)
    total_weight = read_number("total_weight", total_weight, lambda number: 0 <= number <= 64, "0 to 64")
    granularity = min(read_whole("granularity", granularity), MOST_TOKENS)
    if max_split is not None:
        max_split = min(read_whole("max_split", max_split), world_size)
    multicast = read_flag("multicast", multicast)
    special = granularity > 1 or max_split is not None or multicast  # the other strategies know nothing of these
    if not (cost is None or callable(cost)):
        raise ValueError(f"cost={shown(cost)}: expected a function, as flashcp.predicted_time gives, or None")
    if world_size == 1:
        return contiguous(document_lengths, world_size)

    given = read_workload(document_lengths) if workload is None else workload
    workload = given.reduced
    pairs = int(workload.document_pairs.sum())
    least = least_largest_work(document_lengths, world_size, workload)

    def search(tolerance: float) -> tuple[ShardTable, int, int]:
        """A plan, its critical rows, and the limit of a rank's work."""
        limit = max(int(tolerance * pairs / world_size), least)
        settings = (limit, round(64 * total_weight), max_split or world_size, granularity, multicast)
        found, critical = _search(document_lengths, world_size, budget, settings, workload)
        swapped = found
        if largest_work(found, world_size, workload) > limit and document_lengths.sum() <= FEW_ROWS * world_size:
            swapped = exchange_rows(document_lengths, world_size, found, limit, workload)
        whole = keep_blocks_whole(document_lengths, world_size, swapped, limit, workload)
        if whole is not found:
            critical = rows_of_layers(ShardingPlan(document_lengths, world_size, whole, workload=workload)).critical
        return whole, critical, limit

    few = document_lengths.sum() <= world_size  # at most one row on each rank
    if few:
        own = contiguous(document_lengths, world_size)
    else:
        own, critical, limit = search(tolerance)
        better = None if special else best_member(document_lengths, world_size, limit, own, critical, workload)
        own = own if better is None else better
    if cost is None:
        return own
    tables = [] if few else [search(1 + (tolerance - 1) * slack)[0] for slack in SLACKS]
    if not special:
        tables += members(document_lengths, world_size, workload)
    kept = kept_blocks(workload.masks, int(document_lengths.sum()) // world_size)
    cuts = cut_blocks(workload.masks, kept, own)
    tables = [own, *(table for table in tables if cut_blocks(workload.masks, kept, table) <= cuts)]
    times = [cost(ShardingPlan(document_lengths, world_size, table, "flashcp", workload=given)) for table in tables]
    best = 0
    for number, time in enumerate(times):
        read_number("time of cost", time, math.isfinite, "a finite number")
        if times[best] - time > CLEARLY * abs(times[best]):
            best = number
    return tables[best]


@cache
def loops(compiled: bool) -> Sequence[Callable[..., Any]]:
    """`fill`, `fill_mix` and `improve`, or their compiled twins: the same whole numbers, the same plan.

    The plain ones, with a warning, where numba is not installed: the same plan, after seconds for a big window.
    """
    if compiled:
        try:
            helpers, inlined = (*FILLING, *SEARCHING), (*COUNTING, *HOLDING)
            return compiled_twins([fill, fill_mix, improve], helpers, inlined, error_model="numpy")
        except ModuleNotFoundError:
            warnings.warn("numba is not installed: big windows are planned uncompiled, slowly", stacklevel=2)
    return fill, fill_mix, improve


def _search(
    lengths: np.ndarray,
    world_size: int,
    budget: int | None,
    settings: tuple[int, int, int, int, bool],
    workload: Workload,
) -> tuple[ShardTable, int]:
    """Fill, then search from several seeds, the better half going on each time. Returns the critical rows too."""
    small = int(lengths.sum()) <= SMALL_WINDOW
    run_fill, run_fill_mix, run_improve = loops(compiled=not small)
    # Of very many documents the longest are planned one by one; the others are dealt into 8 bundles a rank, which
    # differ by one document's length at most and leave every rank room: the 16 N longest have as many tokens a rank.
    divisible = 16 * world_size + 256
    if len(lengths) <= divisible + 8 * world_size:
        divisible = len(lengths)
    order, pairs = np.argsort(-lengths, kind="stable"), workload.document_pairs
    density = None
    if not workload.is_causal:
        alone = order[:divisible]
        order[:divisible] = alone[np.argsort(-pairs[alone] / lengths[alone], kind="stable")]  # densest first
        density = density_of(workload, order[:divisible], int(lengths.sum()) // world_size)

    def first_plan(look: bool) -> tuple[Holders, np.ndarray]:
        holders, bundle, room, target = _bundled(lengths[order], pairs[order], divisible, world_size)
        if density is None:
            run_fill(holders, divisible, room, target, look)
        else:
            run_fill_mix(holders, divisible, room, target, density)
        return holders, bundle

    first, bundle = first_plan(look=False)
    many = len(first.length) * world_size > MANY
    if many:  # lengths of few kinds, far apart, are better filled as they come
        plans = [first_plan(look=True)[0], first]
        first = plans[0]
    if budget is None:
        budget = 400 if small else (200_000 if many else 44_000) + 250 * world_size
        if density is not None:
            budget //= 2  # a change takes longer
    whole = many and int(first.number.max()) == 1  # no document is cut: nothing travels
    trial = no_holders(np.zeros(3, dtype=np.int64), world_size + 2)
    starts = 2 if many else min(STARTS, max(1, budget // LEAST_MOVES))
    if not many:
        plans = [first, *(Holders(*map(np.copy, first)) for _ in range(starts - 1))]
    running = [(one, np.array([SEED + 7919 * start])) for start, one in enumerate(plans)]
    rounds = starts.bit_length()
    for _ in range(rounds):
        moves = 0 if whole else budget // rounds // len(running)
        reached = [
            run_improve(one, trial, divisible, world_size, moves, seed, *settings, density) for one, seed in running
        ]
        ranked = sorted(range(len(running)), key=lambda i: (reached[i], i))
        running = [running[i] for i in ranked[: max(1, len(running) // 2)]]
    (excess, critical), (holders, seed) = reached[ranked[0]], running[0]
    for _ in range(EXTENSIONS):
        if excess == 0:
            break
        moves = budget // rounds
        excess, critical = run_improve(holders, trial, divisible, world_size, moves, seed, *settings, density)
    return _table(holders, lengths[order], order, bundle, divisible), int(critical)


def _bundled(
    length: np.ndarray, pairs: np.ndarray, alone: int, world_size: int
) -> tuple[Holders, np.ndarray, np.ndarray, np.ndarray]:
    """Documents in order, those after the first `alone` ones in bundles, which ranks hold; which bundle each later one
    is in; and the rows and pairs that each rank lacks of an equal share of all, to the whole number.
    """
    rest = length[alone:]
    bundle = np.arange(len(rest)) % (8 * world_size)
    bundles = min(len(rest), 8 * world_size)
    bundle_rows, bundle_work = (sum_by(bundle, amount, bundles) for amount in (rest, pairs[alone:]))

    holders = no_holders(np.concatenate((length[:alone], bundle_rows)), world_size + 1)
    rank = np.arange(bundles) % world_size
    holders.number[alone:] = 1
    for column, values in ((holders.rank, rank), (holders.rows, bundle_rows), (holders.work, bundle_work)):
        column[0, alone:] = values

    def missing(amounts: np.ndarray, bundled: np.ndarray) -> np.ndarray:
        share, left = divmod(int(amounts.sum()), world_size)
        return share + (np.arange(world_size) < left) - sum_by(rank, bundled, world_size)

    return holders, bundle, missing(length, bundle_rows), missing(pairs, bundle_work)


def _table(holders: Holders, length: np.ndarray, order: np.ndarray, bundle: np.ndarray, divisible: int) -> ShardTable:
    """The pieces: heads in holders' order from a document's start, tails from its end, bundled documents whole."""
    document, slot = np.nonzero(np.arange(holders.number.max()) < holders.number[:divisible, None])
    rank, rows, tail = (array[slot, document] for array in (holders.rank, holders.rows, holders.tail))
    first = (np.cumsum(holders.number) - holders.number)[document]

    def before(amount: np.ndarray) -> np.ndarray:
        """Sum over the earlier holders of the same document."""
        earlier = np.cumsum(amount) - amount
        return earlier - earlier[first]

    head = rows - tail
    low, high = before(head), holders.length[document] - before(tail)
    bundled = np.arange(divisible, len(length))
    pieces = ShardTable(
        order[np.concatenate((document, document, bundled))],
        np.concatenate((low, high - tail, np.zeros_like(bundled))),
        np.concatenate((low + head, high, length[bundled])),
        np.concatenate((rank, rank, holders.rank[0, divisible + bundle])),
    )
    return pieces.take(pieces.rows > 0)
