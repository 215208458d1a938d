"""Every document, or the whole window, in equal pieces: `contiguous`, `per_document` and `per_sequence`.

Lengths that do not divide: the rows left over are dealt to the ranks round robin, the next document going on where
the last one stopped, so that ranks never differ by more than one row over the whole pack. A row left over makes
one of the rank's pieces longer instead of becoming a piece of its own.
"""

from __future__ import annotations

import numpy as np

from flashcp.sharding.documents import document_offsets
from flashcp.sharding.shards import ShardTable

_BLOCK_PIECES = 1 << 22  # pieces computed at a time: bounds memory for many documents on many ranks


def contiguous(document_lengths: np.ndarray, world_size: int) -> ShardTable:
    """Every document in N pieces, piece i on rank i (ring-flash-attention's varlen version).

    Equal tokens, unequal work: the last rank holds every document's tail.
    """
    return _cut(document_lengths, world_size, np.arange(world_size))


def per_document(document_lengths: np.ndarray, world_size: int) -> ShardTable:
    """Every document in 2N chunks, rank i holding i and 2N-1-i (WLB-LLM, arXiv 2503.17924).

    Equal tokens and nearly equal work, at the price of cutting every document 2N ways.
    """
    ranks = np.arange(world_size)
    return _cut(document_lengths, world_size, np.concatenate((ranks, ranks[::-1])))


def per_sequence(document_lengths: np.ndarray, world_size: int) -> ShardTable:
    """The packed window in 2N chunks, rank i holding i and 2N-1-i (Llama 3, arXiv 2407.21783).

    Chunks ignore where documents end: balanced for one long document, not for a pack.
    """
    offsets = document_offsets(document_lengths)
    chunks = per_document(offsets[-1:], world_size)
    bounds = np.union1d(offsets, chunks.stop)
    first, stop = bounds[:-1], bounds[1:]
    document = np.searchsorted(offsets, first, side="right") - 1
    chunk = np.searchsorted(chunks.stop, first, side="right")
    return ShardTable(document, first - offsets[document], stop - offsets[document], chunks.rank[chunk])


def _cut(lengths: np.ndarray, world_size: int, owner: np.ndarray) -> ShardTable:
    """Documents in as many consecutive pieces as `owner` has ranks, piece j on owner[j]; a rank's later ones come in
    turns of N pieces."""
    pieces, turn = len(owner), np.arange(len(owner)) // world_size
    first_rank = (np.cumsum(lengths) - lengths) % world_size
    block = max(1, _BLOCK_PIECES // pieces)
    tables = []
    for i in range(0, len(lengths), block):
        length = lengths[i : i + block, None]
        left_over = length % pieces
        place = (np.arange(world_size) - first_rank[i : i + block, None]) % world_size
        dealt = left_over // world_size + (place < left_over % world_size)  # [documents, ranks]
        sizes = length // pieces + (dealt[:, owner] > turn)  # [documents, pieces]
        document, piece = np.nonzero(sizes)
        rows, stop = sizes[document, piece], np.cumsum(sizes, axis=1)[document, piece]
        tables.append(ShardTable(document + i, stop - rows, stop, owner[piece]))
    return ShardTable(*map(np.concatenate, zip(*tables, strict=True)))
