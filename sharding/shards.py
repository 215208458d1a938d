"""Shards: rows of a document on a rank; one as a tuple, many as arrays, and where they lie in a buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np

from flashcp.sharding.documents import expand_ranges


class Shard(NamedTuple):
    """Rows start..stop (stop excluded) of one document, held by one rank."""

    document: int
    start: int
    stop: int
    rank: int


class ShardTable(NamedTuple):
    """Shards as four int64 arrays of one length, in any order: what a strategy returns."""

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    rank: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        return self.stop - self.start

    def take(self, index: np.ndarray) -> ShardTable:
        return ShardTable(*(column[index] for column in self))

    def side_by_side(self) -> Segments:
        """The shards in a buffer that they fill one after another."""
        return Segments(*self, np.cumsum(self.rows) - self.rows)


class Segments(NamedTuple):
    """Row ranges of documents and where they lie in one buffer; int64 arrays of one length.

    `rank` is the other end: the owner of rows in a receive buffer, the reader of rows that are sent.
    `row` is the buffer row that holds row `start` of the document.
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    rank: np.ndarray
    row: np.ndarray

    def take(self, index: np.ndarray) -> Segments:
        return Segments(*(column[index] for column in self))

    def buffer_rows(self) -> np.ndarray:
        """Every row of the buffer these segments cover, in order, int64."""
        return expand_ranges(self.row, self.stop - self.start)


def shard_work(start: np.ndarray | int, stop: np.ndarray) -> np.ndarray:
    """Causal query-key pairs of the queries start..stop of a document: (2p + s + 1) s / 2 (paper, section 3)."""
    return (start + stop + 1) * (stop - start) // 2


class ShardView(Sequence[Shard]):
    """The shards of a plan as objects, made one at a time from its arrays."""

    __hash__ = None  # type: ignore[assignment]  # a list of shards, and as unhashable as one

    def __init__(self, table: ShardTable) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table.document)

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> list[Shard]: ...
    def __getitem__(self, index: int | slice) -> Shard | list[Shard]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Shard(*(int(column[index]) for column in self._table))

    def __iter__(self) -> Iterator[Shard]:
        return map(Shard._make, zip(*(column.tolist() for column in self._table), strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:4]))
        return f"[{shown}{', ...' if len(self) > 4 else ''}] ({len(self)} shards)"


SHARDS = "(document, start, stop, rank) in whole numbers"


def read_shards(shards: Sequence[object]) -> ShardTable:
    """(document, start, stop, rank) tuples as arrays. Raises ValueError for anything but whole numbers."""
    wrong = ValueError(f"shards: expected {SHARDS}")
    try:
        rows = np.array([tuple(shard) for shard in shards]).reshape(len(shards), 4)  # type: ignore[arg-type]
    except Exception as error:  # what a caller iterates over may raise anything
        raise wrong from error
    if len(shards) and rows.dtype.kind not in "iu":
        raise wrong
    return ShardTable(*rows.astype(np.int64).T)
