"""`wlb_adaptive`: the better of `per_sequence` and `per_document` by predicted kernel time (WLB-LLM, section 5.3).

The prediction: FlashAttention-3's causal bf16 forward, head_dim 128, on one H200 as its users report it. Nothing is
published below 1,024 rows; there the throughput is taken as proportional to the rows, which is our assumption.
Only ratios matter: the table decides between two plans and predicts no time that anybody is shown.
"""

from __future__ import annotations

import numpy as np

from flashcp.sharding.masks import Workload
from flashcp.sharding.shards import ShardTable
from flashcp.sharding.strategies.equal_pieces import per_document, per_sequence

TILE_ROWS = 128
KV_ROWS = (0, 1024, 4096, 16384)
TFLOPS = (0.0, 511.0, 690.0, 695.0)


def wlb_adaptive(document_lengths: np.ndarray, world_size: int, workload: Workload | None = None) -> ShardTable:
    """The plan whose slowest rank is predicted faster, over all layers of the workload (None: causal); on a tie
    `per_sequence`, which has fewer shards."""
    candidates = [strategy(document_lengths, world_size) for strategy in (per_sequence, per_document)]
    return min(candidates, key=lambda table: _slowest(table, world_size, workload))


def _slowest(table: ShardTable, world_size: int, workload: Workload | None) -> float:
    """Query rows are padded to the tile; the pairs they touch are divided by the throughput at the shard's KV rows."""
    padded = -(-table.rows // TILE_ROWS) * TILE_ROWS
    if workload is None or workload.is_causal:
        times = padded * (table.start + (padded + 1) / 2) / np.interp(table.stop, KV_ROWS, TFLOPS)
    else:
        times = np.zeros(len(padded))
        for masks, count in workload.kinds:
            seen = masks.past(table.document, table.stop - 1) - masks.lowest(table.document, table.start)
            pairs = masks.pairs(*table[:3]) * (padded / table.rows)
            times += count * pairs / np.interp(seen, KV_ROWS, TFLOPS)
    # Nine digits: enough to tell plans apart, too few for the last bit of a sum to choose differently elsewhere.
    return float(f"{np.bincount(table.rank, weights=times, minlength=world_size).max():.9g}")
