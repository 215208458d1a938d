"""What becomes of the products of queries and keys before and in the softmax."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from flashcp.kernels.inputs import default_scale


class Scores(NamedTuple):
    """scale: of the products. softcap: scores become softcap * tanh(score / softcap), as in Gemma 2; 0: they stay.
    sinks: a logit a query head that joins the softmax of each row, [H] (`flashcp.kernels.sinks`); None: none."""

    scale: float
    softcap: float = 0.0
    sinks: Tensor | None = None


def read_scores(q: Tensor, softmax_scale: float | None, softcap: float | None, sinks: Tensor | None) -> Scores:
    """As users give them, for queries [rows, H, head_dim]. Raises ValueError for numbers and sinks that do not fit."""
    scale = default_scale(q, softmax_scale)
    if softcap is not None:
        is_number = isinstance(softcap, int | float) and not isinstance(softcap, bool)
        if not (is_number and math.isfinite(softcap) and softcap > 0):
            raise ValueError(f"softcap={softcap!r}: expected a positive number, or None")
        raise ValueError("softcap: no implementation of attention has one yet")
    if sinks is not None:
        if not isinstance(sinks, Tensor):
            raise ValueError(f"sinks is a {type(sinks).__name__}: expected a tensor [query heads], or None")
        if sinks.shape != q.shape[1:2] or not sinks.dtype.is_floating_point or sinks.device != q.device:
            raise ValueError(
                f"sinks are {sinks.dtype} {list(sinks.shape)} on {sinks.device}: expected floating-point "
                f"[{q.shape[1]}], one for each query head, on {q.device}"
            )
    return Scores(scale, float(softcap or 0.0), sinks)
