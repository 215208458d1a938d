"""A plan says which rank holds which rows of which document: plain arrays, validated, printable, comparable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, NamedTuple, overload

import numpy as np

from flashcp.sharding.documents import (
    document_offsets,
    expand_ranges,
    read_document_lengths,
    read_world_size,
)

if TYPE_CHECKING:
    from flashcp.sharding.bounds import Certificate
    from flashcp.sharding.route import Route

__all__ = ["Segments", "Shard", "ShardTable", "ShardView", "ShardingPlan", "shard_work"]


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
        """The segments that an index or mask array picks."""
        return Segments(*(column[index] for column in self))

    def buffer_rows(self) -> np.ndarray:
        """Every row of the buffer these segments cover, in order, int64."""
        return expand_ranges(self.row, self.stop - self.start)


def shard_work(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Causal query-key pairs of the queries start..stop of a document: (2p + s + 1) s / 2 (paper, section 3)."""
    return (start + stop + 1) * (stop - start) // 2


class ShardView(Sequence[Shard]):
    """The shards of a plan as objects, made one at a time from its arrays."""

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

    __hash__ = None  # type: ignore[assignment]  # a list of shards, and as unhashable as one

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:4]))
        return f"[{shown}{', ...' if len(self) > 4 else ''}] ({len(self)} shards)"


@dataclass(frozen=True, eq=False, repr=False)
class ShardingPlan:
    """Which rank holds which rows of one pack.

    On construction touching shards of one document on one rank become one, shards are sorted by document and
    start, and every row of every document is checked to lie on exactly one rank (ValueError otherwise).

    document_lengths: int64 [documents], tokens. world_size: ranks. table: the shards, int64 arrays.
    strategy: the name of what made the plan; it takes no part in comparison, hash or fingerprint.
    """

    document_lengths: np.ndarray
    world_size: int
    table: ShardTable
    strategy: str = "custom"

    def __post_init__(self) -> None:
        lengths = read_document_lengths(self.document_lengths)
        world_size = read_world_size(self.world_size, int(lengths.sum()))
        table = _merge_touching(_sorted_table(self.table))
        _check_cover(lengths, world_size, table)
        for column in table:
            column.flags.writeable = False
        object.__setattr__(self, "document_lengths", lengths)
        object.__setattr__(self, "world_size", world_size)
        object.__setattr__(self, "table", table)

    @classmethod
    def from_shards(
        cls, document_lengths: Iterable[int], world_size: int, shards: Iterable[Shard | Sequence[int]]
    ) -> ShardingPlan:
        """A plan from (document, start, stop, rank) tuples. Raises ValueError as the constructor does."""
        return cls(read_document_lengths(document_lengths), world_size, _read_shards(list(shards)))

    @property
    def shards(self) -> ShardView:
        """Every shard, sorted by document and start."""
        return ShardView(self.table)

    @cached_property
    def offsets(self) -> np.ndarray:
        """Row of the pack where each document starts, int64 [documents + 1]."""
        offsets = document_offsets(self.document_lengths)
        offsets.flags.writeable = False
        return offsets

    @cached_property
    def tokens(self) -> np.ndarray:
        """Rows each rank holds, int64 [world_size]."""
        return self._per_rank(self.table.stop - self.table.start)

    @cached_property
    def work(self) -> np.ndarray:
        """Causal query-key pairs each rank computes, int64 [world_size]."""
        return self._per_rank(shard_work(self.table.start, self.table.stop))

    @property
    def imbalance(self) -> float:
        """Largest work of a rank over the mean, >= 1."""
        return int(self.work.max()) * self.world_size / int(self.work.sum())

    def local(self, rank: int) -> Segments:
        """The shards of a rank and the local row where each begins (local order is pack order)."""
        self._check_rank(rank)
        mine = np.flatnonzero(self.table.rank == rank)
        document, start, stop, owner = (column[mine] for column in self.table)
        ends = np.cumsum(stop - start)
        return Segments(document, start, stop, owner, ends - (stop - start))

    def rows(self, rank: int) -> np.ndarray:
        """Row of the pack of every local row of a rank, in local order, int64 [tokens[rank]]."""
        mine = self.local(rank)
        return expand_ranges(self.offsets[mine.document] + mine.start, mine.stop - mine.start)

    def positions(self, rank: int) -> np.ndarray:
        """Position inside its document of every local row of a rank, int64 [tokens[rank]]."""
        mine = self.local(rank)
        return expand_ranges(mine.start, mine.stop - mine.start)

    def route(self, exchange: str = "exact") -> Route:
        """Which rows travel from which rank to which under an exchange (`flashcp.sharding.route`)."""
        from flashcp.sharding.route import Route

        return Route(self, exchange)

    @cached_property
    def certificate(self) -> Certificate:
        """Proven lower bounds for this window and this plan's distance to them (`flashcp.sharding.bounds`)."""
        from flashcp.sharding.bounds import certify

        return certify(self)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over lengths, world size and shards: equal on every rank that holds the same plan."""
        digest = hashlib.blake2b(digest_size=8)
        for array in (np.array([self.world_size]), self.document_lengths, *self.table):
            digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()

    def to_json(self) -> str:
        """One JSON object: document_lengths, world_size, strategy, shards as [document, start, stop, rank]."""
        return json.dumps(
            {
                "document_lengths": self.document_lengths.tolist(),
                "world_size": self.world_size,
                "strategy": self.strategy,
                "shards": np.stack(self.table, axis=1).tolist(),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> ShardingPlan:
        """The plan `to_json` wrote. Raises ValueError for anything else."""
        try:
            fields = json.loads(text)
            shards = _read_shards(fields["shards"])
            lengths, world_size = fields["document_lengths"], fields["world_size"]
            strategy = str(fields.get("strategy", "custom"))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"not the JSON of a plan: {error!r}") from error
        return cls(read_document_lengths(lengths), world_size, shards, strategy)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardingPlan) and (
            self.world_size == other.world_size
            and np.array_equal(self.document_lengths, other.document_lengths)
            and all(map(np.array_equal, self.table, other.table))
        )

    def __hash__(self) -> int:
        return int(self.fingerprint, 16)

    def __repr__(self) -> str:
        return (
            f"ShardingPlan({self.strategy}: {len(self.document_lengths)} documents, {self.offsets[-1]} tokens, "
            f"{self.world_size} ranks, {len(self.shards)} shards, imbalance {self.imbalance:.3f}, "
            f"fingerprint {self.fingerprint})"
        )

    def __str__(self) -> str:
        route = self.route("exact")
        lines = [
            repr(self),
            f"{'rank':>5} {'shards':>7} {'tokens':>8} {'work/mean':>10} {'rows sent':>10} {'received':>9}",
        ]
        shards = np.bincount(self.table.rank, minlength=self.world_size)
        mean = self.work.sum() / self.world_size
        shown = range(self.world_size) if self.world_size <= 16 else [*range(8), *range(-7, 0)]
        for rank in shown:
            if self.world_size > 16 and rank == -7:
                lines.append(f"{'...':>5}")
            lines.append(
                f"{rank % self.world_size:>5} {shards[rank]:>7} {self.tokens[rank]:>8} {self.work[rank] / mean:>10.3f} "
                f"{route.sent_rows[rank]:>10} {route.received_rows[rank]:>9}"
            )
        return "\n".join(lines)

    def _per_rank(self, amount: np.ndarray) -> np.ndarray:
        total = np.zeros(self.world_size, dtype=np.int64)
        np.add.at(total, self.table.rank, amount)
        total.flags.writeable = False
        return total

    def _check_rank(self, rank: int) -> None:
        if not isinstance(rank, Integral) or not 0 <= rank < self.world_size:
            raise ValueError(f"rank={rank!r}: expected 0 to {self.world_size - 1}")


def _read_shards(shards: Sequence[Sequence[int]]) -> ShardTable:
    try:
        rows = np.array([tuple(shard) for shard in shards]).reshape(len(shards), 4)
    except (TypeError, ValueError) as error:
        raise ValueError("shards: expected (document, start, stop, rank) in whole numbers") from error
    if len(shards) and rows.dtype.kind not in "iu":
        raise ValueError("shards: expected (document, start, stop, rank) in whole numbers")
    return ShardTable(*rows.astype(np.int64).T)


def _sorted_table(table: ShardTable) -> ShardTable:
    columns = [np.asarray(column) for column in table]
    if len({column.shape for column in columns}) != 1 or columns[0].ndim != 1:
        raise ValueError(f"shard arrays of shapes {[column.shape for column in columns]}: expected one length")
    if any(column.size and column.dtype.kind not in "iu" for column in columns):
        raise ValueError("shard arrays: expected whole numbers")
    order = np.lexsort((columns[1], columns[0]))
    return ShardTable(*(column.astype(np.int64)[order] for column in columns))


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
    if (stop <= start).any():
        where = int(np.argmax(stop <= start))
        raise ValueError(f"shard {Shard(*(int(c[where]) for c in table))}: expected start < stop")
    held = np.unique(document)
    if len(held) != len(lengths):
        raise ValueError(f"document {np.setdiff1d(np.arange(len(lengths)), held)[0]} is on no rank")
    opens = np.concatenate(([True], document[1:] != document[:-1]))
    expected_start = np.where(opens, 0, np.concatenate(([0], stop[:-1])))
    closes = np.concatenate((opens[1:], [True]))
    wrong = (start != expected_start) | (closes & (stop != lengths[document]))
    if wrong.any():
        where = int(np.argmax(wrong))
        shard = Shard(*(int(c[where]) for c in table))
        raise ValueError(
            f"rows of document {shard.document} ({lengths[shard.document]} tokens) are not each on exactly one rank: "
            f"shard {shard} should start at {expected_start[where]}"
            + (f" and end at {lengths[shard.document]}" if closes[where] else "")
        )
