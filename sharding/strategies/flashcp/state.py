"""What the search works on: how many rows and how much work each rank holds of each document."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["Holders", "no_holders"]


class Holders(NamedTuple):
    """Who holds how much of each document, int64. Documents are sorted, longest first; bundles come last.

    A bundle is several whole short documents that move together; its length is their tokens.
    The pieces follow from the holders' order (`search.layout`).
    """

    length: np.ndarray  # [documents]
    count: np.ndarray  # [documents] holders of each
    rank: np.ndarray  # [documents, slots] the holders, in the order in which they take their tails
    rows: np.ndarray  # [documents, slots]
    work: np.ndarray  # [documents, slots]
    tail: np.ndarray  # [documents, slots] rows taken from the end; the others are taken from the start

    def copy(self) -> Holders:
        """The same in arrays of its own."""
        return Holders(*(array.copy() for array in self))


def no_holders(length: np.ndarray, slots: int) -> Holders:
    """Documents that nobody holds yet, with room for `slots` holders each."""
    shape = (len(length), slots)
    count = np.zeros(len(length), dtype=np.int64)
    return Holders(length, count, *(np.zeros(shape, dtype=np.int64) for _ in range(4)))
