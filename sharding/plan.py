"""A plan: an assignment of rows to ranks, with its route, its certificate and its text; printable, comparable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flashcp.sharding.assignment import Assignment
from flashcp.sharding.bounds import Certificate, certify
from flashcp.sharding.documents import check_choice, read_document_lengths
from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.route import Route
from flashcp.sharding.shards import Segments, Shard, ShardTable, read_shards

__all__ = ["Segments", "Shard", "ShardTable", "ShardingPlan"]


@dataclass(frozen=True, eq=False, repr=False)
class ShardingPlan(Assignment):
    """An assignment, and what a caller asks about it; made and checked as `Assignment` says.

    strategy: the name of what made the plan; it takes no part in comparison, hash or fingerprint.
    """

    strategy: str = "custom"

    @classmethod
    def from_shards(
        cls, document_lengths: Iterable[int], world_size: int, shards: Iterable[Shard | Sequence[int]]
    ) -> ShardingPlan:
        """A plan from (document, start, stop, rank) tuples. Raises ValueError as the constructor does."""
        return cls(read_document_lengths(document_lengths), world_size, read_shards(list(shards)))

    def route(self, exchange: str = "exact") -> Route:
        """Which rows travel from which rank to which. Raises ValueError for an exchange that there is not."""
        check_choice("exchange", exchange, EXCHANGES)
        return EXCHANGES[exchange](self)

    @cached_property
    def certificate(self) -> Certificate:
        """Proven lower bounds for this window and this plan's distance to them (`flashcp.sharding.bounds`)."""
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
        fields = {"document_lengths": self.document_lengths.tolist(), "world_size": self.world_size}
        return json.dumps({**fields, "strategy": self.strategy, "shards": np.stack(self.table, axis=1).tolist()})

    @classmethod
    def from_json(cls, text: str) -> ShardingPlan:
        """The plan `to_json` wrote. Raises ValueError for anything else."""
        try:
            fields = json.loads(text)
            shards = read_shards(fields["shards"])
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
