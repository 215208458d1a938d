"""An assignment says which rank holds which rows of one pack: arrays, checked, and what follows by counting."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from flashcp.sharding.documents import document_offsets, expand_ranges, read_document_lengths, read_world_size, sum_by
from flashcp.sharding.mask import LayerKind
from flashcp.sharding.masks import Masks, Workload, read_workload
from flashcp.sharding.shards import Segments, Shard, ShardTable, ShardView
from flashcp.sharding.values import read_whole, shown


@dataclass(frozen=True, eq=False, repr=False)
class Assignment:
    """Which rank holds which rows of one pack. `ShardingPlan` is one; routes and bounds look at no more than this.

    On construction touching shards of one document on one rank become one, shards are sorted by document and
    start, and every row of every document is checked to lie on exactly one rank (ValueError otherwise).

    document_lengths: int64 [documents], tokens. world_size: ranks. table: the shards, int64 arrays.
    workload: the documents' masks and the model's layer mix; None: causal.
    """

    document_lengths: np.ndarray
    world_size: int
    table: ShardTable
    workload: Workload = field(default=None, kw_only=True)  # type: ignore[assignment]  # never None once constructed

    def __post_init__(self) -> None:
        lengths = read_document_lengths(self.document_lengths)
        world_size = read_world_size(self.world_size)
        table = _merge_touching(_sorted_table(self.table))
        _check_cover(lengths, world_size, table)
        workload = read_workload(lengths) if self.workload is None else self.workload
        if not isinstance(workload, Workload):
            raise ValueError(f"workload={shown(workload)}: expected a Workload, or None")
        if not np.array_equal(workload.masks.length, lengths):
            raise ValueError("masks of documents of other lengths")
        given = (("document_lengths", lengths), ("world_size", world_size), ("table", table), ("workload", workload))
        for name, value in given:
            object.__setattr__(self, name, value)
        _freeze(*table)

    @property
    def masks(self) -> Masks:
        """Which keys each row sees."""
        return self.workload.masks

    @property
    def layers(self) -> tuple[LayerKind, ...]:
        """The mix that the plan was made for."""
        return self.workload.layers

    @property
    def shards(self) -> ShardView:
        """Every shard, sorted by document and start."""
        return ShardView(self.table)

    @cached_property
    def offsets(self) -> np.ndarray:
        """Row of the pack where each document starts, int64 [documents + 1]."""
        return _freeze(document_offsets(self.document_lengths))

    @cached_property
    def tokens(self) -> np.ndarray:
        """Rows each rank holds, int64 [world_size]."""
        return _freeze(sum_by(self.table.rank, self.table.rows, self.world_size))

    @cached_property
    def work(self) -> np.ndarray:
        """Query-key pairs each rank computes, int64 [world_size]; with a layer mix, of all its layers together."""
        return _freeze(sum_by(self.table.rank, self.shard_work, self.world_size))

    @cached_property
    def shard_work(self) -> np.ndarray:
        """The same of each shard, int64 [shards]."""
        return self.workload.pairs(*self.table[:3])

    @property
    def imbalance(self) -> float:
        """Largest work of a rank over the mean, >= 1."""
        return int(self.work.max()) * self.world_size / int(self.work.sum())

    def local(self, rank: int) -> Segments:
        """The shards of a rank and the local row where each begins (local order is pack order)."""
        self.check_rank(rank)
        return self.table.take(np.flatnonzero(self.table.rank == rank)).side_by_side()

    def rows(self, rank: int) -> np.ndarray:
        """Row of the pack of every local row of a rank, in local order, int64 [tokens[rank]]."""
        mine = self.local(rank)
        return expand_ranges(self.offsets[mine.document] + mine.start, mine.stop - mine.start)

    def positions(self, rank: int) -> np.ndarray:
        """Position inside its document of every local row of a rank, int64 [tokens[rank]]."""
        mine = self.local(rank)
        return expand_ranges(mine.start, mine.stop - mine.start)

    def check_rank(self, rank: int) -> None:
        """Raise ValueError for a rank that there is not."""
        read_whole("rank", rank, 0, self.world_size - 1, f"0 to {self.world_size - 1}")


def _freeze(*arrays: np.ndarray) -> np.ndarray:
    for array in arrays:
        array.flags.writeable = False
    return arrays[0]


def _sorted_table(table: ShardTable) -> ShardTable:
    if not isinstance(table, ShardTable):
        raise ValueError(f"table={shown(table)}: expected a ShardTable")
    columns = [np.asarray(column) for column in table]
    if len({column.shape for column in columns}) != 1 or columns[0].ndim != 1:
        raise ValueError(f"shard arrays of shapes {[column.shape for column in columns]}: expected one length")
    if any(column.size and column.dtype.kind not in "iu" for column in columns):
        raise ValueError("shard arrays: expected whole numbers")
    return ShardTable(*(column.astype(np.int64) for column in columns)).take(np.lexsort((columns[1], columns[0])))


def _merge_touching(table: ShardTable) -> ShardTable:
    document, start, stop, rank = table
    joined = (document[1:] == document[:-1]) & (rank[1:] == rank[:-1]) & (start[1:] == stop[:-1])
    first = np.concatenate(([True], ~joined))[: len(document)]
    last = np.concatenate((~joined, [True]))[: len(document)]
    return ShardTable(document[first], start[first], stop[last], rank[first])


def _check_cover(lengths: np.ndarray, world_size: int, table: ShardTable) -> None:
    document, start, stop, rank = table
    for name, column, limit in (("document", document, len(lengths)), ("rank", rank, world_size)):
        wrong = (column < 0) | (column >= limit)
        if wrong.any():
            raise ValueError(f"shard {name}={column[np.argmax(wrong)]}: expected 0 to {limit - 1}")

    def shard(where: int) -> Shard:
        return Shard(*(int(column[where]) for column in table))

    if (stop <= start).any():
        raise ValueError(f"shard {shard(int(np.argmax(stop <= start)))}: expected start < stop")
    held = np.unique(document)
    if len(held) != len(lengths):
        raise ValueError(f"document {np.setdiff1d(np.arange(len(lengths)), held)[0]} is on no rank")
    opens = np.concatenate(([True], document[1:] != document[:-1]))
    expected_start = np.where(opens, 0, np.concatenate(([0], stop[:-1])))
    closes = np.concatenate((opens[1:], [True]))
    wrong = (start != expected_start) | (closes & (stop != lengths[document]))
    if wrong.any():
        where = int(np.argmax(wrong))
        length = lengths[document[where]]
        end = f" and end at {length}" if closes[where] else ""
        raise ValueError(
            f"rows of document {document[where]} ({length} tokens) are not each on exactly one rank: "
            f"shard {shard(where)} should start at {expected_start[where]}{end}"
        )
