"""What becomes of the products of queries and keys before and in the softmax."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from flashcp.kernels.inputs import check_sinks, default_scale, read_softcap


class Scores(NamedTuple):
    """scale: of the products. softcap: scores become softcap * tanh(score / softcap), as in Gemma 2; 0: they stay.
    sinks: a logit a query head that joins the softmax of each row, [H] (`flashcp.kernels.sinks`); None: none."""

    scale: float
    softcap: float = 0.0
    sinks: Tensor | None = None


def read_scores(q: Tensor, softmax_scale: float | None, softcap: float | None, sinks: Tensor | None) -> Scores:
    """As users give them, for queries [rows, H, head_dim]. Raises ValueError for numbers and sinks that do not fit."""
    check_sinks(sinks, q)
    return Scores(default_scale(q, softmax_scale), read_softcap(softcap), sinks)
