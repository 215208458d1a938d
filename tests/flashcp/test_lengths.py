"""Document lengths from position ids, offsets and document numbers; labels that stay inside documents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import flashcp

LENGTHS = [3, 1, 4, 1]
POSITIONS = [0, 1, 2, 0, 0, 1, 2, 3, 0]
OFFSETS = [0, 3, 4, 8, 9]
NUMBERS = [0, 0, 0, 1, 2, 2, 2, 2, 5]


@pytest.mark.parametrize(
    "given",
    [
        {"position_ids": POSITIONS},
        {"position_ids": torch.tensor(POSITIONS, dtype=torch.int32)[None]},
        {"cu_seqlens": OFFSETS},
        {"cu_seqlens": torch.tensor(OFFSETS, dtype=torch.int32)},
        {"seq_idx": NUMBERS},
        {"seq_idx": torch.tensor([NUMBERS])},
    ],
)
def test_three_ways_to_say_where_documents_begin(given: dict[str, Any]) -> None:
    lengths = flashcp.lengths_of(**given)
    assert (lengths.dtype, lengths.tolist()) == (np.int64, LENGTHS)


def test_a_document_ends_with_its_row() -> None:
    assert flashcp.lengths_of(position_ids=[[0, 1], [0, 1]]).tolist() == [2, 2]
    assert flashcp.lengths_of(seq_idx=[[0, 0], [0, 1]]).tolist() == [2, 1, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "lengths_of(): expected one of position_ids, cu_seqlens, seq_idx"),
        ({"seq_idx": [0], "cu_seqlens": [0, 1]}, "lengths_of(cu_seqlens, seq_idx): expected one of"),
        ({"position_ids": [0, 1, 3]}, "position_ids[2]=3: expected 2 or 0, where a document begins"),
        ({"position_ids": [4, 5]}, "position_ids[0]=4: expected 0"),
        ({"position_ids": [[0, 1], [2, 3]]}, "position_ids[1, 0]=2: expected 0"),
        ({"position_ids": [0.0, 1.0]}, "position_ids holds float64 (first value np.float64(0.0)): expected whole"),
        ({"position_ids": torch.zeros(3, 1, 8, dtype=torch.int64)}, "position_ids has shape (3, 1, 8): expected"),
        ({"position_ids": [[0, 1], [0]]}, "position_ids=[[0, 1], [0]]: expected whole numbers"),
        ({"cu_seqlens": [0, 4, 4, 9]}, "cu_seqlens=[0, 4, 4, 9]: expected whole numbers that begin with 0 and grow"),
        ({"cu_seqlens": [1, 4]}, "cu_seqlens=[1, 4]: expected whole numbers that begin with 0 and grow"),
        ({"cu_seqlens": [0]}, "cu_seqlens=[0]: expected whole numbers that begin with 0 and grow"),
        ({"cu_seqlens": [[0, 4]]}, "cu_seqlens has shape (1, 2): expected [documents + 1]"),
        ({"seq_idx": [0, 1, 0]}, "seq_idx[2]=0: expected 1 or more, of a later document"),
        ({"seq_idx": []}, "seq_idx has shape (0,): expected [tokens] or [rows, tokens]"),
    ],
)
def test_numbers_that_no_pack_has(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        flashcp.lengths_of(**given)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_plan_of_offsets_says_what_makes_lengths_of_them() -> None:
    with pytest.raises(ValueError, match=r"grow from 0 as cu_seqlens do.*flashcp\.lengths_of\(cu_seqlens=\.\.\.\)"):
        flashcp.plan(torch.tensor(OFFSETS), 2)


def test_labels_stay_inside_documents() -> None:
    labels = torch.arange(10, 19)
    shifted = flashcp.shift_labels(labels, LENGTHS)
    assert shifted.tolist() == [11, 12, -100, -100, 15, 16, 17, -100, -100]
    assert labels.tolist() == list(range(10, 19))
    assert flashcp.shift_labels(labels[None], LENGTHS, ignore=0)[0, 2] == 0
    with pytest.raises(ValueError, match=r"labels \[8\]: expected \[\.\.\., 9\], the tokens of all documents"):
        flashcp.shift_labels(labels[:8], LENGTHS)
