"""The other strategies as members of the portfolio: when one of their plans is better, `flashcp` returns it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from flashcp.sharding.documents import sum_by
from flashcp.sharding.exchanges import rows_of_layers
from flashcp.sharding.mask import NO_LIMIT
from flashcp.sharding.masks import Workload
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.shards import ShardTable
from flashcp.sharding.strategies.equal_pieces import contiguous, per_document, per_sequence
from flashcp.sharding.strategies.flashcp.blocks import cut_blocks, kept_blocks
from flashcp.sharding.strategies.flashcp_paper import SINGLE_STEPS, TARGET_IMBALANCE, flashcp_paper, try_cut


def members(lengths: np.ndarray, world_size: int, workload: Workload | None = None) -> list[ShardTable]:
    tables = [member(lengths, world_size) for member in (contiguous, per_document, per_sequence)]
    return [*tables, flashcp_paper(lengths, world_size, workload=workload)]


def best_member(
    lengths: np.ndarray, world_size: int, limit: int, found: ShardTable, critical: int, workload: Workload
) -> ShardTable | None:
    """The member's plan that beats the found one's (largest work above the limit, critical rows, largest work); None:
    none does.

    critical: the found plan's, as the search counts them. Most members are not even built: what their rule says about
    the longest documents already rules them out.
    """

    def rows(table: ShardTable) -> int:
        return rows_of_layers(ShardingPlan(lengths, world_size, table, workload=workload)).critical

    best, work = None, largest_work(found, world_size, workload)
    key = (max(work, limit), critical, work)
    if critical == 0 and work * world_size <= int(workload.document_pairs.sum()) + world_size:
        return None
    counted = workload.is_causal
    kept = kept_blocks(workload.masks, int(lengths.sum()) // world_size)
    cuts = cut_blocks(workload.masks, kept, found)
    for table in _candidates(lengths, world_size, limit, key, workload):
        work = largest_work(table, world_size, workload)
        above = max(work, limit)
        if above > key[0] or cut_blocks(workload.masks, kept, table) > cuts:
            continue
        if not counted:  # layers wait for their own busiest ranks, the search for one of all
            key, counted = (key[0], rows(found), key[2]), True
        if (above, this := rows(table), work) < key:
            key, best = (above, this, work), table
    return best


def _candidates(
    lengths: np.ndarray, world_size: int, limit: int, key: tuple[int, int, int], workload: Workload
) -> Iterator[ShardTable]:
    """The members' plans that may beat the key."""
    critical = key[1]
    tokens, pairs = int(lengths.sum()), int(workload.document_pairs.sum())
    # Layers in which the last row of a document reads all of it.
    layers = sum(count * ((m.window == NO_LIMIT) & (m.chunk == NO_LIMIT)) for m, count in workload.kinds)
    # Else a member may win by its work, whatever its rows.
    balanced = key[0] <= limit and limit * world_size <= TARGET_IMBALANCE * pairs
    most = -(-tokens // world_size)

    # One rank holds the last rows of every document with at least 2N: it receives all of their other rows.
    long = lengths >= 2 * world_size
    striped = int((layers * lengths)[long].sum()) - most * int(layers.max())
    if not balanced or striped <= critical:
        yield contiguous(lengths, world_size)
        yield per_document(lengths, world_size)
    yield per_sequence(lengths, world_size)

    # The paper's heuristic cuts the heaviest documents 2N ways, one more until its target is reached; the rank with
    # their last rows holds two chunks of each.
    heaviest_first = np.argsort(-workload.document_pairs, kind="stable")
    foreign = (layers * (lengths - 2 * (lengths // (2 * world_size) + 1)))[heaviest_first]
    received = np.concatenate(([0], np.cumsum(np.maximum(foreign, 0))))
    for cut in range(min(len(lengths), SINGLE_STEPS) + 1):
        if balanced and received[cut] > critical:
            return
        attempt = try_cut(lengths, heaviest_first, cut, world_size, workload)
        if attempt.imbalance <= TARGET_IMBALANCE:
            yield attempt.table()
            return
    yield flashcp_paper(lengths, world_size, workload=workload)


def largest_work(table: ShardTable, world_size: int, workload: Workload) -> int:
    return int(sum_by(table.rank, workload.pairs(*table[:3]), world_size).max())
