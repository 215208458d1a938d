"""`wlb_adaptive`: the better of `per_sequence` and `per_document` by predicted kernel time (WLB-LLM, section 5.3)."""

from __future__ import annotations

import numpy as np

from flashcp.sharding.shards import ShardTable
from flashcp.sharding.strategies.per_document import per_document
from flashcp.sharding.strategies.per_sequence import per_sequence
from flashcp.sharding.throughput import relative_time

__all__ = ["wlb_adaptive"]


def wlb_adaptive(document_lengths: np.ndarray, world_size: int) -> ShardTable:
    """The plan whose slowest rank is predicted faster; on a tie `per_sequence`, which has fewer shards."""
    candidates = [strategy(document_lengths, world_size) for strategy in (per_sequence, per_document)]
    return min(candidates, key=lambda table: _slowest(table, world_size))


def _slowest(table: ShardTable, world_size: int) -> float:
    # Nine digits: enough to tell plans apart, too few for the last bit of a sum to choose differently elsewhere.
    time = np.bincount(table.rank, weights=relative_time(table.start, table.stop), minlength=world_size)
    return float(f"{time.max():.9g}")
