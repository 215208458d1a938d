"""The reference against attention written another way: a dense mask over the whole pack."""

from __future__ import annotations

import pytest
import torch

from flashcp.kernels.reference import reference_attention
from tests.packs import AWKWARD, random_qkv


@pytest.mark.parametrize("lengths", AWKWARD, ids=str)
def test_reference_is_softmax_under_a_document_mask(lengths: tuple[int, ...]) -> None:
    q, k, v, _ = random_qkv(sum(lengths), 4, 2, 8, torch.float64, seed=1)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    rows = torch.arange(len(document))
    visible = (document[:, None] == document) & (rows[:, None] >= rows)
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))), visible, scale=0.7
    )
    torch.testing.assert_close(reference_attention(q, k, v, lengths, 0.7), out.transpose(0, 1))


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (((4, 2, 8), (4, 2, 8), (4, 2)), "expected .tokens, heads, head_dim."),
        (((4, 2, 8), (4, 2, 8), (4, 1, 8)), "as many heads"),
        (((4, 2, 8), (5, 2, 8), (5, 2, 8)), "equal tokens"),
        (((4, 2, 8), (4, 2, 4), (4, 2, 4)), "equal tokens and head_dim"),
        (((4, 2, 8), (4, 2, 8), (4, 2, 0)), "multiple of KV heads"),
        (((4, 3, 8), (4, 2, 8), (4, 2, 8)), "multiple of KV heads"),
        (((4, 2, 8), (4, 0, 8), (4, 0, 8)), "multiple of KV heads"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes: tuple, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        reference_attention(*(torch.zeros(shape) for shape in shapes), [4])


def test_dtypes_lengths_and_scales_that_do_not_fit_are_named() -> None:
    x = torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match="one floating-point dtype"):
        reference_attention(x, x.half(), x, [4])
    with pytest.raises(ValueError, match="one floating-point dtype"):
        reference_attention(x.int(), x.int(), x.int(), [4])
    with pytest.raises(ValueError, match="add up to 5: expected the 4"):
        reference_attention(x, x, x, [4, 1])
    with pytest.raises(ValueError, match="softmax_scale=-1"):
        reference_attention(x, x, x, [4], -1.0)
