"""Documents laid end to end in windows of a fixed number of tokens: which piece lies where."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from flashcp.sharding.documents import MOST_TOKENS
from flashcp.sharding.values import check_choice, holds_items, is_whole, read_flag, read_whole, shown

OVERFLOWS = ("truncate", "carry")


class Window(NamedTuple):
    """One pack: rows start..stop (stop excluded) of each document in it, int64 arrays [documents].

    The arrays are in pack order; `document` counts the lengths as they were given. `dropped` is the number of
    tokens of the last document that no window will hold.
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    dropped: int

    @property
    def document_lengths(self) -> np.ndarray:
        """Tokens of each piece: what `flashcp.plan` takes, int64 [documents]."""
        return self.stop - self.start

    @property
    def carried(self) -> int:
        """Tokens that continue a document which an earlier window began."""
        return int(self.document_lengths[self.start > 0].sum())


def pack_lengths(
    lengths: Iterable[int],
    context: int,
    overflow: str = "truncate",
    *,
    first_start: int = 0,
    keep_last: bool = True,
) -> Iterator[Window]:
    """Windows of exactly `context` tokens, documents in the order given.

    A document that reaches beyond a window's end fills it; the rest of it is dropped (`truncate`, the paper's
    rule) or opens the next window (`carry`). A length is asked for only when the window under way needs it:
    `lengths` may be endless, or a generator that reads documents as they are asked for.

    first_start: row of the first document to begin at (`carry` taken up again in the middle of a document).
    keep_last: also hand out the last window when it is not full.

    Raises ValueError for a length that is not a whole number >= 1, an unknown overflow, or a context below 1.
    """
    check_choice("overflow", overflow, OVERFLOWS)
    context = read_whole("context", context, most=MOST_TOKENS, expected="a number of tokens >= 1 and < 2**31")
    first_start, keep_last = read_whole("first_start", first_start, 0), read_flag("keep_last", keep_last)
    if not holds_items(lengths):
        raise ValueError(f"lengths={shown(lengths)}: expected whole numbers >= 1")
    return _windows(lengths, context, overflow == "carry", first_start, keep_last)


def _windows(lengths: Iterable[int], context: int, carry: bool, start: int, keep_last: bool) -> Iterator[Window]:
    pieces: list[tuple[int, int, int]] = []
    room = context
    for document, length in enumerate(map(_whole, lengths)):
        while start < length:
            stop = min(length, start + room)
            pieces.append((document, start, stop))
            room -= stop - start
            start = stop if carry else length
            if room == 0:
                yield _window(pieces, dropped=0 if carry else length - stop)
                pieces, room = [], context
        start = 0
    if pieces and keep_last:
        yield _window(pieces, dropped=0)


def _window(pieces: list[tuple[int, int, int]], dropped: int) -> Window:
    document, start, stop = np.array(pieces, dtype=np.int64).T
    return Window(document, start, stop, dropped)


def _whole(length: int) -> int:
    if is_whole(length) and length >= 1:
        return int(length)
    raise ValueError(f"document length {shown(length)}: expected a whole number >= 1")
