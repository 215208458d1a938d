"""The other strategies as members of the portfolio: when one of their plans is better, `flashcp` returns it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from flashcp.sharding.documents import sum_by
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.shards import ShardTable
from flashcp.sharding.strategies.equal_pieces import contiguous, per_document, per_sequence
from flashcp.sharding.strategies.flashcp_paper import SINGLE_STEPS, TARGET_IMBALANCE, flashcp_paper, try_cut


def members(lengths: np.ndarray, world_size: int) -> list[ShardTable]:
    return [member(lengths, world_size) for member in (contiguous, per_document, per_sequence, flashcp_paper)]


def best_member(lengths: np.ndarray, world_size: int, limit: int, work: int, critical: int) -> ShardTable | None:
    """The member's plan that beats (largest work above the limit, critical rows), None if there is none.

    Most members are not even built: what their rule says about the longest documents already rules them out.
    """
    best = None
    key = (max(work, limit), critical)
    if key == (limit, 0):
        return None
    for table in _candidates(lengths, world_size, limit, key):
        most = max(largest_work(table, world_size), limit)
        if most > key[0]:
            continue
        rows = int(ShardingPlan(lengths, world_size, table).route("exact").critical_rows)
        if (most, rows) < key:
            key, best = (most, rows), table
    return best


def _candidates(lengths: np.ndarray, world_size: int, limit: int, key: tuple[int, int]) -> Iterator[ShardTable]:
    """The members' plans that may beat the key."""
    critical = key[1]
    tokens, pairs = int(lengths.sum()), int((lengths * (lengths + 1) // 2).sum())
    # Else a member may win by its work, whatever its rows.
    balanced = key[0] <= limit and limit * world_size <= TARGET_IMBALANCE * pairs
    most = -(-tokens // world_size)

    # One rank holds the last rows of every document with at least 2N: it receives all of their other rows.
    striped = int(lengths[lengths >= 2 * world_size].sum()) - most
    if not balanced or striped < critical:
        yield contiguous(lengths, world_size)
        yield per_document(lengths, world_size)
    yield per_sequence(lengths, world_size)

    # The paper's heuristic cuts the longest documents 2N ways, one more until its target is reached; the rank with
    # their last rows holds two chunks of each.
    longest_first = np.argsort(-lengths, kind="stable")
    foreign = lengths[longest_first] - 2 * (lengths[longest_first] // (2 * world_size) + 1)
    received = np.concatenate(([0], np.cumsum(np.maximum(foreign, 0))))
    for cut in range(min(len(lengths), SINGLE_STEPS) + 1):
        if balanced and received[cut] >= critical:
            return
        attempt = try_cut(lengths, longest_first, cut, world_size)
        if attempt.imbalance <= TARGET_IMBALANCE:
            yield attempt.table()
            return
    yield flashcp_paper(lengths, world_size)


def largest_work(table: ShardTable, world_size: int) -> int:
    return int(sum_by(table.rank, table.work, world_size).max())
