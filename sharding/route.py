"""A route says which KV rows travel from which rank to which: a pure function of a plan and an exchange."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from flashcp.sharding.assignment import Assignment
from flashcp.sharding.shards import Segments
from flashcp.sharding.values import check_choice, read_flag, read_whole, shown

GRADIENT_WIRES = ("auto", "model", "fp32")
"""What gradients travel in that are added up: the model's dtype, or fp32. `auto` is fp32 where a sum would be rounded
again on its way, else the model's dtype (docs/exchange.md has the errors of both)."""


MOST_ROW_BYTES = 2**28
"""Of all query heads."""


def gathered_rows(tokens: int, ranks: int) -> int:
    """That a rank sends in an all-gather of an even plan: blocks are padded to the longest."""
    return (ranks - 1) * -(-tokens // ranks)


def is_fp32(gradient_wire: str, roundings: int) -> bool:
    """Whether gradients travel in fp32. roundings: how often they would be rounded on their way to be added up; 0 where
    they are whole, and so are rounded in the end in any case."""
    return roundings > 0 and (gradient_wire == "fp32" or (gradient_wire == "auto" and roundings > 1))


def wire_bytes(dtype_bytes: int, gradient_wire: str, roundings: int) -> int:
    """Bytes of a number of such gradients, of a model whose numbers have dtype_bytes."""
    return max(4, dtype_bytes) if is_fp32(gradient_wire, roundings) else dtype_bytes


def read_heads(query_heads: int, kv_heads: int, head_dim: int, dtype_bytes: int, prefix: str = "") -> list[int]:
    """The four as they are. prefix: of their names in messages. Raises ValueError for heads that do not fit, and for
    rows of more bytes than a pack's rows can be multiplied with in int64."""
    given = {"query_heads": query_heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype_bytes": dtype_bytes}
    read = {name: read_whole(f"{prefix}{name}", number) for name, number in given.items()}
    if read["query_heads"] % read["kv_heads"]:
        raise ValueError(
            f"{prefix}query_heads={shown(query_heads)}: expected a multiple of {prefix}kv_heads={shown(kv_heads)}"
        )
    row_bytes = read["query_heads"] * read["head_dim"] * read["dtype_bytes"]
    if row_bytes > MOST_ROW_BYTES:
        told = ", ".join(f"{prefix}{name}={shown(number)}" for name, number in read.items())
        raise ValueError(f"{told}: expected rows of at most {MOST_ROW_BYTES} bytes")
    return list(read.values())


class Route:
    """The traffic of one plan under one exchange; each exchange is a subclass in `flashcp.sharding.exchanges`.

    roundings: of gradients on their way home, see `is_fp32`.
    """

    exchange: str
    roundings = 1

    def __init__(self, plan: Assignment) -> None:
        self.plan = plan

    @property
    def sent_rows(self) -> np.ndarray:
        """KV rows (K and V of one token) that leave each rank in the forward pass, padding counted [world_size].

        Whole numbers, but for `ulysses`, whose rows are split by heads.
        """
        return self._rows[0]

    @property
    def received_rows(self) -> np.ndarray:
        """KV rows that reach each rank in the forward pass, padding counted [world_size]."""
        return self._rows[1]

    @property
    def critical_rows(self) -> int | float:
        """Largest max(sent, received) of a rank: what the slowest link carries."""
        return np.maximum(*self._rows).max().item()

    @property
    def saving(self) -> float:
        """1 - critical rows / the all-gather's rows; 0 for one rank.

        At least 0 where ranks differ by at most one row, as those of all strategies do.
        """
        ranks = self.plan.world_size
        if ranks == 1:
            return 0.0
        return 1.0 - self.critical_rows / gathered_rows(int(self.plan.offsets[-1]), ranks)

    @property
    def imbalance(self) -> float:
        """Max/mean of what ranks compute: the plan's, but 1.0 for `ulysses`, which shares out heads."""
        return self.plan.imbalance

    @property
    def block_rows(self) -> int:
        """Rows of the largest block of one rank, for exchanges that move blocks; `compacted` leaves rows out."""
        return int(self.plan.tokens.max())

    def received(self, rank: int) -> Segments:
        """What lies where in a rank's receive buffer; `rank` of a segment is the owner of its rows."""
        self.plan.check_rank(rank)
        return self._received(rank)

    def sent(self, rank: int) -> Segments:
        """Which local rows of a rank leave, in order: all of them, once, but for `compacted` and `exact`.

        `rank` of a segment is the reader under `exact`, else the rank itself.
        """
        return self.plan.local(rank)

    def segments(self, source: int, destination: int) -> list[tuple[int, int, int]]:
        """Row ranges (document, start, stop) that one rank gets from another, in buffer order."""
        self.plan.check_rank(source)
        arriving = self.received(destination)
        chosen = arriving.take((arriving.rank == source) & (arriving.rank != destination))
        return list(zip(*(column.tolist() for column in chosen[:3]), strict=True))

    def bytes(
        self,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        dtype_bytes: int,
        backward: bool = False,
        gradient_wire: str = "model",
    ) -> np.ndarray:
        """Bytes that leave each rank, all tensors counted, int64 [world_size].

        backward=True: the backward's bytes alone. Gradients of the received rows go home, so what a rank received in
        the forward it sends in the backward, in dtype_bytes a number or as gradient_wire says (`wire_bytes`).
        Raises ValueError for heads that do not fit.
        """
        query_heads, kv_heads, head_dim, dtype_bytes = read_heads(query_heads, kv_heads, head_dim, dtype_bytes)
        backward = read_flag("backward", backward)
        check_choice("gradient_wire", gradient_wire, GRADIENT_WIRES)
        width = wire_bytes(dtype_bytes, gradient_wire, self._roundings(kv_heads)) if backward else dtype_bytes
        whole, of_kv = self._head_rows(query_heads, kv_heads, backward)
        return (whole * dtype_bytes + of_kv * width) * head_dim

    def __repr__(self) -> str:
        return (
            f"Route({self.exchange}: {self.plan.world_size} ranks, critical rows {self.critical_rows}, "
            f"saving {self.saving:.3f})"
        )

    @cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        sent, received = self._count()
        sent.flags.writeable = received.flags.writeable = False
        return sent, received

    def _count(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows sent and received per rank."""
        raise NotImplementedError

    def _received(self, rank: int) -> Segments:
        raise NotImplementedError

    def _roundings(self, kv_heads: int) -> int:
        """Of gradients of so many KV heads."""
        return self.roundings

    def _head_rows(self, query_heads: int, kv_heads: int, backward: bool) -> tuple[np.ndarray, np.ndarray]:
        """Rows of single heads that leave each rank: of queries and outputs, and of K and V."""
        of_kv = (self.received_rows if backward else self.sent_rows) * (2 * kv_heads)
        return np.zeros_like(of_kv), of_kv
