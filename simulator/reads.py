"""Who reads how many rows from whom, and in how many tiles: what a plan's attention costs is linear in that."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flashcp.sharding.documents import expand_ranges
from flashcp.sharding.plan import ShardingPlan
from flashcp.simulator.cost import ReadFeatures, read_features

Tiles = tuple[int, int]


class Reads(NamedTuple):
    """Per shard [S], in the plan's order, what its queries read of the document's other shards, by owner [S, N].

    rank, rows: int64 [S]. others: rows that each rank holds and the shard reads; of a causal document those before it.
    ranges: how many shards those are. own, by_owner, together: features of the reads of its own rows [S], of those of
    each rank [S, N], and of all others in one kernel [S].
    """

    rank: np.ndarray
    rows: np.ndarray
    others: np.ndarray
    ranges: np.ndarray
    own: ReadFeatures
    by_owner: ReadFeatures
    together: ReadFeatures


def plan_reads(plan: ShardingPlan, tiles: Tiles) -> Reads:
    """The reads of every shard of a plan, in tiles of so many query and key rows; memory and time grow with shards x
    ranks, under masks with tiles x the shards that each sees."""
    return _causal(plan, tiles) if plan.masks.is_causal else _masked(plan, tiles)


def _causal(plan: ShardingPlan, tiles: Tiles) -> Reads:
    document, start, _, rank = plan.table
    every, first = np.arange(len(rank)), np.searchsorted(document, document)
    rows = plan.table.rows

    def before(amount: np.ndarray | int) -> np.ndarray:
        """Sum over earlier shards of the document, by owner."""
        total = np.zeros((len(rank) + 1, plan.world_size), dtype=np.int64)
        total[every + 1, rank] = amount
        np.cumsum(total, axis=0, out=total)
        return total[:-1] - total[first]

    others, ranges = before(rows), before(1)
    own = read_features(rows, rows, tiles, masked=True)
    by_owner = read_features(rows[:, None], others, tiles, ranges=ranges)
    return Reads(rank, rows, others, ranges, own, by_owner, read_features(rows, start, tiles))


def _masked(plan: ShardingPlan, tiles: Tiles) -> Reads:
    """Tile by tile: of each shard that a query tile sees, keys that all its rows see, and those at the edges."""
    document, start, stop, rank = plan.table
    masks, shards, ranks = plan.masks, len(rank), plan.world_size
    tile_q, tile_k = tiles
    count = -(-plan.table.rows // tile_q)
    shard = np.repeat(np.arange(shards), count)
    first = start[shard] + expand_ranges(np.zeros_like(count), count) * tile_q
    last = np.minimum(first + tile_q, stop[shard]) - 1
    of_tile = document[shard]
    seen = masks.lowest(of_tile, first), masks.past(of_tile, last)
    by_all = masks.lowest(of_tile, last), masks.past(of_tile, first)

    tile, key = _overlapping(plan, of_tile, *seen)
    visible, full = (
        np.maximum(np.minimum(past[tile], stop[key]) - np.maximum(lowest[tile], start[key]), 0)
        for lowest, past in (seen, by_all)
    )
    padded, in_full = -(-visible // tile_k) * tile_k, full // tile_k * tile_k
    reader, own = shard[tile], shard[tile] == key

    def sums(amount: np.ndarray, chosen: np.ndarray, of_owners: bool) -> np.ndarray:
        if not of_owners:
            return np.bincount(reader[chosen], amount[chosen], shards)
        where = reader[chosen] * ranks + rank[key[chosen]]
        return np.bincount(where, amount[chosen], shards * ranks).reshape(shards, ranks)

    reads, read = _overlapping(plan, document, masks.lowest(document, start), masks.past(document, stop - 1))
    low, high = masks.lowest(document, start), masks.past(document, stop - 1)
    rows_read = np.minimum(high[reads], stop[read]) - np.maximum(low[reads], start[read])
    apart = reads != read
    pair = reads[apart] * ranks + rank[read[apart]]
    others = np.bincount(pair, rows_read[apart], shards * ranks).reshape(shards, ranks).astype(np.int64)
    ranges = np.bincount(pair, minlength=shards * ranks).reshape(shards, ranks)

    def features(chosen: np.ndarray, of_owners: bool, key_rows: np.ndarray, ranges: np.ndarray) -> ReadFeatures:
        full_pairs = tile_q * sums(in_full, chosen, of_owners)
        masked = tile_q * sums(padded - in_full, chosen, of_owners)
        queries = plan.table.rows[:, None] if of_owners else plan.table.rows
        return ReadFeatures(full_pairs, masked, key_rows * 1.0, queries * (key_rows > 0) * 1.0, ranges * 1.0)

    rows = plan.table.rows
    sides = np.minimum(ranges.sum(axis=1), 1 + (high > stop))  # what lies before the shard is one range, behind another
    return Reads(
        rank,
        rows,
        others,
        ranges,
        features(own, False, rows, np.ones(shards)),
        features(~own, True, others, ranges),
        features(~own, False, others.sum(axis=1), sides),
    )


def _overlapping(
    plan: ShardingPlan, document: np.ndarray, lowest: np.ndarray, past: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Every interval of a document with every shard that has rows of it: an index into either."""
    begins = plan.offsets[plan.table.document] + plan.table.start
    first = np.searchsorted(begins, plan.offsets[document] + lowest, side="right") - 1
    behind = np.searchsorted(begins, plan.offsets[document] + past, side="left")
    count = behind - first
    return np.repeat(np.arange(len(document)), count), expand_ranges(first, count)
