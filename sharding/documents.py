"""Document lengths and world sizes, checked once at the door, and the arithmetic of ranges and groups."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from flashcp.sharding.values import read_list, read_whole, shown

MOST_TOKENS = 2**31 - 1  # of a pack: its work, tokens squared, then fits int64
MOST_RANKS = 2**20
"""Of a plan: arrays of one number a rank are made before anything else is known."""


def read_document_lengths(document_lengths: Iterable[int] | np.ndarray) -> np.ndarray:
    """Lengths of the documents of one pack, in tokens, as a read-only int64 array [documents].

    Raises ValueError for an empty list, a length that is not a whole number, or one below 1.
    """
    given = document_lengths if isinstance(document_lengths, np.ndarray) else _array(document_lengths)
    if given.ndim != 1 or given.size == 0:
        raise ValueError(f"document_lengths has shape {given.shape}: expected a list of at least one whole number >= 1")
    if given.dtype.kind not in "iu":
        raise ValueError(
            f"document_lengths holds {given.dtype} (first value {shown(given[0])}): expected whole numbers >= 1"
        )
    tokens = given.sum(dtype=np.float64)
    if given.max() > MOST_TOKENS or tokens > MOST_TOKENS:
        raise ValueError(f"document_lengths hold {tokens:.0f} tokens: expected at most {MOST_TOKENS}")
    lengths = given.astype(np.int64)
    if lengths[0] == 0 and lengths.size > 1 and (np.diff(lengths) > 0).all():
        raise ValueError(
            f"document_lengths={shown(lengths.tolist())} grow from 0 as cu_seqlens do: expected lengths, as "
            "flashcp.lengths_of(cu_seqlens=...) gives them"
        )
    if lengths.min() < 1:
        where = int(np.argmax(lengths < 1))
        raise ValueError(f"document_lengths[{where}]={lengths[where]}: expected a whole number >= 1")
    lengths.flags.writeable = False
    return lengths


def _array(document_lengths: Iterable[int]) -> np.ndarray:
    items = read_list("document_lengths", document_lengths, "a list of whole numbers >= 1")
    try:
        return np.asarray(items)
    except Exception as error:  # items may be anything, tensors among them
        said = shown(document_lengths)
        raise ValueError(f"document_lengths={said}: expected a list of whole numbers >= 1") from error


def read_world_size(world_size: int) -> int:
    """The number of ranks. Raises ValueError unless it is a whole number from 1 to MOST_RANKS."""
    return read_whole("world_size", world_size, most=MOST_RANKS)


def document_offsets(document_lengths: np.ndarray) -> np.ndarray:
    """Row of the pack where each document starts, int64 [documents + 1]; the last entry is the pack's size."""
    return np.concatenate(([0], np.cumsum(document_lengths, dtype=np.int64)))


def expand_ranges(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Concatenation of `arange(start[i], start[i] + count[i])` over i, int64 [sum(count)]."""
    ends = np.cumsum(count, dtype=np.int64)
    total = int(ends[-1]) if ends.size else 0
    return np.arange(total, dtype=np.int64) + np.repeat(start - (ends - count), count)


def sum_by(group: np.ndarray, amount: np.ndarray, groups: int) -> np.ndarray:
    """Sum of the amounts of each group, int64 [groups]; `np.bincount` sums floats, which are too short for work."""
    total = np.zeros(groups, dtype=np.int64)
    np.add.at(total, group, amount)
    return total
