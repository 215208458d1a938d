"""Cutting documents into equal pieces: the arithmetic that `contiguous`, `per_document` and `per_sequence` share.

Lengths that do not divide: the rows left over are dealt to the ranks round robin, the next document going on where
the last one stopped, so that ranks never differ by more than one row over the whole pack. A row left over makes
one of the rank's pieces longer instead of becoming a piece of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flashcp.sharding.shards import ShardTable

__all__ = ["head_tail_chunks", "head_tail_sizes", "piece_table", "striped_pieces"]

_BLOCK_PIECES = 1 << 22  # pieces computed at a time: bounds memory for many documents on many ranks


def striped_pieces(lengths: np.ndarray, world_size: int) -> ShardTable:
    """Every document in `world_size` contiguous pieces, piece i on rank i."""

    def sizes(length: np.ndarray, first_rank: np.ndarray) -> np.ndarray:
        return length[:, None] // world_size + _dealt(length % world_size, first_rank, world_size)

    return _cut(lengths, world_size, sizes, np.arange(world_size))


def head_tail_chunks(lengths: np.ndarray, world_size: int) -> ShardTable:
    """Every document in 2 `world_size` chunks, rank i holding chunks i and 2N-1-i."""
    ranks = np.arange(world_size)
    return _cut(
        lengths,
        world_size,
        lambda length, first: head_tail_sizes(length, first, world_size),
        np.concatenate((ranks, ranks[::-1])),
    )


def head_tail_sizes(length: np.ndarray, first_rank: np.ndarray, world_size: int) -> np.ndarray:
    """Rows of the 2N chunks of documents whose left-over rows are dealt from `first_rank` on, [documents, 2N]."""
    extra = _dealt(length % (2 * world_size), first_rank, world_size)
    head = length[:, None] // (2 * world_size) + (extra > 0)
    tail = length[:, None] // (2 * world_size) + (extra > 1)
    return np.concatenate((head, tail[:, ::-1]), axis=1)


def piece_table(sizes: np.ndarray, ranks: np.ndarray, first_document: int = 0) -> ShardTable:
    """Shards of documents cut into consecutive pieces of `sizes` [documents, pieces]; piece j lies on ranks[j]."""
    stops = np.cumsum(sizes, axis=1)
    document, piece = np.nonzero(sizes)
    stop = stops[document, piece]
    return ShardTable(document + first_document, stop - sizes[document, piece], stop, ranks[piece])


def _dealt(left_over: np.ndarray, first_rank: np.ndarray, world_size: int) -> np.ndarray:
    """How many of `left_over` rows each rank gets when they are dealt from `first_rank` on, [documents, ranks]."""
    place = (np.arange(world_size) - first_rank[:, None]) % world_size
    return left_over[:, None] // world_size + (place < left_over[:, None] % world_size)


def _cut(
    lengths: np.ndarray,
    world_size: int,
    sizes: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ranks: np.ndarray,
) -> ShardTable:
    first_rank = (np.cumsum(lengths) - lengths) % world_size
    block = max(1, _BLOCK_PIECES // len(ranks))
    tables = [
        piece_table(sizes(lengths[i : i + block], first_rank[i : i + block]), ranks, first_document=i)
        for i in range(0, len(lengths), block)
    ]
    return ShardTable(*map(np.concatenate, zip(*tables, strict=True)))
