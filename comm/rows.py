"""Rows that leave a rank, and memory in which others' rows arrive.

Shapes: T local rows, K KV heads, D head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from flashcp.kernels.interface import KV

__all__ = ["Inbox", "OutgoingRows", "row_bytes"]


@dataclass(frozen=True)
class OutgoingRows:
    """Rows on their way out of a rank. Nobody may write to their tensors before they have left.

    rows: a tensor [rows, ...], whose rows leave as they lie. Or K and V [T, K, D], of which the rows `index`, int64,
    leave side by side, [rows, 2, K, D]: K first, V behind. what: their name in a trace.
    """

    rows: Tensor | KV
    index: Tensor | None = None
    what: str = "rows"

    def __len__(self) -> int:
        return len(self.rows if self.index is None else self.index)

    def packed(self) -> Tensor:
        """All of them, contiguous [rows, ...]: for a transport that sends one message."""
        if isinstance(self.rows, Tensor):
            return self.rows.contiguous()
        assert self.index is not None
        if self.rows.k.is_cuda:
            from flashcp.kernels.pack import pack_rows

            return pack_rows(*self.rows, self.index)
        packed = self.rows.k.new_empty((len(self), 2, *self.rows.k.shape[1:]))
        self.write(packed, 0, len(self))
        return packed

    def write(self, into: Tensor, start: int, stop: int) -> None:
        """Rows start..stop into memory [stop - start, ...] that may be another rank's."""
        if isinstance(self.rows, Tensor):
            into.copy_(self.rows[start:stop], non_blocking=True)
            return
        assert self.index is not None
        chosen = self.index[start:stop]
        for i, part in enumerate(self.rows):
            into[:, i].copy_(part.index_select(0, chosen), non_blocking=True)


def row_bytes(rows: Tensor) -> int:
    """Of one row of a tensor [rows, ...]."""
    return math.prod(rows.shape[1:]) * rows.element_size()


class Inbox(NamedTuple):
    """Memory for others' rows, [rows, ...]. ticket: what the transport knows it by; 0 for memory of its own."""

    rows: Tensor
    ticket: int = 0
