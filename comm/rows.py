"""Rows that leave a rank, and memory in which others' rows arrive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["ChosenRows", "Inbox", "Leaving", "WholeRows"]


class Leaving(Protocol):
    """Rows on their way out. Nobody may write to their tensors before they have left. what: their name in a trace."""

    @property
    def what(self) -> str:
        """See the class."""

    def __len__(self) -> int:
        """How many there are."""

    def packed(self) -> Tensor:
        """All of them, contiguous [rows, ...]: for a transport that sends one message."""

    def write(self, into: Tensor, start: int, stop: int) -> None:
        """Rows start..stop into memory [stop - start, ...] that may be another rank's."""


@dataclass(frozen=True)
class WholeRows:
    """The rows of one tensor [rows, ...] as they lie."""

    rows: Tensor
    what: str = "rows"

    def __len__(self) -> int:
        return len(self.rows)

    def packed(self) -> Tensor:
        """See Leaving."""
        return self.rows.contiguous()

    def write(self, into: Tensor, start: int, stop: int) -> None:
        """See Leaving."""
        into.copy_(self.rows[start:stop], non_blocking=True)


@dataclass(frozen=True)
class ChosenRows:
    """Rows `index` of K and V [T, heads, D] side by side, [rows, 2, heads, D]: K first, V behind."""

    parts: tuple[Tensor, Tensor]
    index: Tensor
    what: str = "rows"

    def __len__(self) -> int:
        return len(self.index)

    def packed(self) -> Tensor:
        """See Leaving."""
        first = self.parts[0]
        if first.is_cuda:
            from flashcp.kernels.pack import pack_rows

            return pack_rows(*self.parts, self.index)
        packed = first.new_empty((len(self), 2, *first.shape[1:]))
        self.write(packed, 0, len(self))
        return packed

    def write(self, into: Tensor, start: int, stop: int) -> None:
        """See Leaving."""
        chosen = self.index[start:stop]
        for i, part in enumerate(self.parts):
            into[:, i].copy_(part.index_select(0, chosen), non_blocking=True)


@dataclass(frozen=True)
class Inbox:
    """Memory for others' rows, [rows, ...]. ticket: what the transport knows it by; 0 for memory of its own."""

    rows: Tensor
    ticket: int = 0
