"""A plan: an assignment of rows to ranks, with its route, its certificate and its text; printable, comparable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from flashcp.sharding.assignment import Assignment
from flashcp.sharding.bounds import Certificate, certify
from flashcp.sharding.documents import MOST_RANKS, MOST_TOKENS, read_document_lengths
from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.holders import rows_between_and_inside
from flashcp.sharding.mask import NO_LIMIT, Mask
from flashcp.sharding.masks import Workload, read_workload, workload_from
from flashcp.sharding.numbered import number_of
from flashcp.sharding.route import Route
from flashcp.sharding.shards import SHARDS, Segments, Shard, ShardTable, read_shards
from flashcp.sharding.values import check_choice, read_list, read_whole, shown

__all__ = ["Segments", "Shard", "ShardTable", "ShardingPlan"]


@dataclass(frozen=True, eq=False, repr=False)
class ShardingPlan(Assignment):
    """An assignment, and what a caller asks about it; made and checked as `Assignment` says.

    strategy: the name of what made the plan. number: what torch operators know this object by, and no copy of it
    (`numbered.py`), int64 [1]. Neither takes part in comparison, hash or fingerprint.
    """

    strategy: str = "custom"
    number: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.masks.longest_block  # found here once: torch.compile reads it as it stands, and cannot find it
        self._take_number()

    def _take_number(self) -> None:
        object.__setattr__(self, "number", number_of(self))

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "number"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._take_number()

    @classmethod
    def from_shards(
        cls,
        document_lengths: Iterable[int],
        world_size: int,
        shards: Iterable[Shard | Sequence[int]],
        masks: Mask | Sequence[Mask] | None = None,
        layers: Iterable[tuple[Mask, int]] | None = None,
    ) -> ShardingPlan:
        """A plan from (document, start, stop, rank) tuples; masks, layers: as `flashcp.plan` takes them. Raises
        ValueError as the constructor does."""
        lengths = read_document_lengths(document_lengths)
        workload = read_workload(lengths, masks, layers)
        return cls(lengths, world_size, read_shards(read_list("shards", shards, SHARDS)), workload=workload)

    def route(self, exchange: str = "exact", window: int | None = None, chunk: int | None = None) -> Route:
        """Which rows travel from which rank to which. window, chunk: in a layer that narrows the plan's masks.

        Raises ValueError for an exchange that there is not, and as `narrow` does.
        """
        check_choice("exchange", exchange, EXCHANGES)
        return EXCHANGES[exchange](self.narrow(window, chunk))

    def narrow(self, window: int | None = None, chunk: int | None = None) -> ShardingPlan:
        """The same shards for layers that see no more than `window` keys back, or than their chunk; None: no limit.

        Raises ValueError for anything but whole numbers >= 1.
        """
        for name, size in (("window", window), ("chunk", chunk)):
            if size is not None:
                read_whole(name, size, expected="a whole number of rows >= 1, or None")
        # No document is longer than MOST_TOKENS: what is larger is no limit, and may not fit int64.
        key = min(int(window or NO_LIMIT), MOST_TOKENS), min(int(chunk or NO_LIMIT), MOST_TOKENS)
        if key not in self._narrowed:
            self._narrowed[key] = self._of_layer(*key)
        return self._narrowed[key]

    @property
    def of_kinds(self) -> list[tuple[ShardingPlan, int]]:
        """The plan as each kind of layers of its mix sees it, and how many those are; without a mix, itself once."""
        kinds = [(self.narrow(kind.window or None, kind.chunk or None), kind.layers) for kind in self.layers]
        return kinds or [(self, 1)]

    def over_layers(self, exchange: str, head_ranks: int = 1) -> tuple[float, float, float]:
        """Imbalance of the sum over the layers; critical rows and saving of an exchange, means over them.

        head_ranks: of holders, whose all-to-alls are counted (`rows_between_and_inside`). Raises ValueError for an
        exchange that there is not, and for less than one.
        """
        head_ranks = read_whole("head_ranks", head_ranks, most=MOST_RANKS)
        routes, layers = zip(*((one.route(exchange), count) for one, count in self.of_kinds), strict=True)
        rows = [rows_between_and_inside(route, head_ranks, 1 / head_ranks) for route in routes]
        # Of routes that share out heads every one is 1, and of the sum too where every layer is even.
        imbalance = self.imbalance if any(route.imbalance > 1 for route in routes) else 1.0
        critical, saving = np.average(rows, axis=0, weights=layers).tolist()
        return imbalance, critical, saving

    @cached_property
    def _narrowed(self) -> dict[tuple[int, int], ShardingPlan]:
        """Layers are asked for again in every step."""
        return {}

    def _of_layer(self, window: int, chunk: int) -> ShardingPlan:
        workload = Workload(self.masks.narrow(window, chunk))
        same = all(map(np.array_equal, workload.columns, self.workload.columns))
        return self if same else replace(self, workload=workload)

    @cached_property
    def certificate(self) -> Certificate:
        """Proven lower bounds for this window and this plan's distance to them (`flashcp.sharding.bounds`)."""
        return certify(self)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over lengths, world size, shards and masks: equal on every rank that holds the same plan."""
        digest = hashlib.blake2b(digest_size=8)
        arrays = [np.array([self.world_size]), self.document_lengths, *self.table]
        if not self.workload.is_causal:
            arrays += self.workload.columns
        for array in arrays:
            digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()

    def to_json(self) -> str:
        """One JSON object: document_lengths, world_size, strategy, shards as [document, start, stop, rank]; unless all
        is causal, workload too: its columns."""
        fields = {"document_lengths": self.document_lengths.tolist(), "world_size": self.world_size}
        fields |= {"strategy": self.strategy, "shards": np.stack(self.table, axis=1).tolist()}
        if not self.workload.is_causal:
            fields["workload"] = [column.tolist() for column in self.workload.columns]
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> ShardingPlan:
        """The plan `to_json` wrote. Raises ValueError for anything else."""
        try:
            fields = json.loads(text)
            shards = read_shards(fields["shards"])
            lengths, world_size = read_document_lengths(fields["document_lengths"]), fields["world_size"]
            strategy = str(fields.get("strategy", "custom"))
            workload = workload_from(lengths, fields["workload"]) if "workload" in fields else read_workload(lengths)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"not the JSON of a plan: {shown(error)}") from error
        return cls(lengths, world_size, shards, strategy, workload=workload)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardingPlan) and (
            self.world_size == other.world_size
            and np.array_equal(self.document_lengths, other.document_lengths)
            and all(map(np.array_equal, self.table, other.table))
            and all(map(np.array_equal, self.workload.columns, other.workload.columns))
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
