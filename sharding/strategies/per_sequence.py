"""`per_sequence`: the packed window in 2N chunks, rank i holding i and 2N-1-i (Llama 3, arXiv 2407.21783)."""

from __future__ import annotations

import numpy as np

from flashcp.sharding.documents import document_offsets
from flashcp.sharding.shards import ShardTable
from flashcp.sharding.strategies.chunks import head_tail_chunks

__all__ = ["per_sequence"]


def per_sequence(document_lengths: np.ndarray, world_size: int) -> ShardTable:
    """Chunks ignore where documents end: balanced for one long document, not for a pack."""
    offsets = document_offsets(document_lengths)
    chunks = head_tail_chunks(offsets[-1:], world_size)
    bounds = np.union1d(offsets, chunks.stop)
    first, stop = bounds[:-1], bounds[1:]
    document = np.searchsorted(offsets, first, side="right") - 1
    chunk = np.searchsorted(chunks.stop, first, side="right")
    return ShardTable(document, first - offsets[document], stop - offsets[document], chunks.rank[chunk])
