"""Packing: every window full, every token in one place or counted as dropped."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashcp.sharding.packing import OVERFLOWS, Window, pack_lengths


def pieces(window: Window) -> list[tuple[int, int, int]]:
    return list(zip(window.document.tolist(), window.start.tolist(), window.stop.tolist(), strict=True))


def test_truncate_drops_what_does_not_fit() -> None:
    windows = list(pack_lengths([6, 7, 3], 10, "truncate"))
    assert [pieces(w) for w in windows] == [[(0, 0, 6), (1, 0, 4)], [(2, 0, 3)]]
    assert [w.dropped for w in windows] == [3, 0]
    assert [w.carried for w in windows] == [0, 0]
    assert windows[0].document_lengths.tolist() == [6, 4]


def test_carry_opens_the_next_window_with_the_rest() -> None:
    windows = list(pack_lengths([6, 27, 2], 10, "carry"))
    assert [pieces(w) for w in windows] == [
        [(0, 0, 6), (1, 0, 4)],
        [(1, 4, 14)],
        [(1, 14, 24)],
        [(1, 24, 27), (2, 0, 2)],
    ]
    assert [w.carried for w in windows] == [0, 10, 10, 3]
    assert all(w.dropped == 0 for w in windows)


def test_a_document_that_just_fits_is_neither_cut_nor_carried() -> None:
    for overflow in OVERFLOWS:
        windows = list(pack_lengths([4, 6, 10], 10, overflow))
        assert [pieces(w) for w in windows] == [[(0, 0, 4), (1, 0, 6)], [(2, 0, 10)]]
        assert [(w.dropped, w.carried) for w in windows] == [(0, 0), (0, 0)]


def test_first_start_takes_a_carried_document_up_again() -> None:
    whole = list(pack_lengths([6, 27, 2], 10, "carry"))
    again = list(pack_lengths([27, 2], 10, "carry", first_start=14))
    assert [[(d + 1, a, b) for d, a, b in pieces(w)] for w in again] == [pieces(w) for w in whole[2:]]


def test_lengths_are_asked_for_one_window_at_a_time() -> None:
    asked = []

    def endless() -> Iterator[int]:
        while True:
            asked.append(4)
            yield 4

    windows = pack_lengths(endless(), 10, "carry")
    next(windows)
    assert len(asked) == 3
    next(windows)
    assert len(asked) == 5  # 2 carried + 4 + 4


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    context=st.integers(1, 50),
    overflow=st.sampled_from(OVERFLOWS),
)
def test_every_token_is_in_one_window_or_counted_as_dropped(lengths: list[int], context: int, overflow: str) -> None:
    windows = list(pack_lengths(lengths, context, overflow))
    assert all(w.document_lengths.sum() == context for w in windows[:-1])
    assert windows[-1].document_lengths.sum() <= context
    times_held = [np.zeros(length, dtype=int) for length in lengths]
    for window in windows:
        for document, start, stop in pieces(window):
            times_held[document][start:stop] += 1
    held = np.concatenate(times_held)
    assert held.max() == 1
    assert (held == 0).sum() == sum(w.dropped for w in windows)
    if overflow == "carry":
        assert held.min() == 1
    full = list(pack_lengths(lengths, context, overflow, keep_last=False))
    assert [pieces(w) for w in full] == [pieces(w) for w in windows if w.document_lengths.sum() == context]


@pytest.mark.parametrize(
    ("lengths", "context", "overflow", "message"),
    [
        ([5, 0], 10, "truncate", r"document length 0: expected a whole number >= 1"),
        ([-3], 10, "truncate", r"document length -3"),
        ([2.5], 10, "truncate", r"document length 2\.5"),
        ([5], 0, "truncate", r"context=0: expected a number of tokens >= 1"),
        ([5], 10, "split", r"overflow='split': expected one of truncate, carry"),
    ],
)
def test_bad_input_names_the_value(lengths: list[int], context: int, overflow: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(pack_lengths(lengths, context, overflow))
