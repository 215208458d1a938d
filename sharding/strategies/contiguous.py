"""`contiguous`: every document in N equal pieces, piece i on rank i (ring-flash-attention's varlen version)."""

from __future__ import annotations

import numpy as np

from flashcp.sharding.shards import ShardTable
from flashcp.sharding.strategies.chunks import striped_pieces

__all__ = ["contiguous"]


def contiguous(document_lengths: np.ndarray, world_size: int) -> ShardTable:
    """Equal tokens, unequal work: the last rank holds every document's tail."""
    return striped_pieces(document_lengths, world_size)
