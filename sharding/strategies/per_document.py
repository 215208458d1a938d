"""`per_document`: every document in 2N chunks, rank i holding i and 2N-1-i (WLB-LLM, arXiv 2503.17924)."""

from __future__ import annotations

import numpy as np

from flashcp.sharding.shards import ShardTable
from flashcp.sharding.strategies.chunks import head_tail_chunks

__all__ = ["per_document"]


def per_document(document_lengths: np.ndarray, world_size: int) -> ShardTable:
    """Equal tokens and nearly equal work, at the price of cutting every document 2N ways."""
    return head_tail_chunks(document_lengths, world_size)
