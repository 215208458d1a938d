"""How far a result is from its reference."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["LARGEST_ERROR", "relative_error"]

LARGEST_ERROR = 1e-2  # bf16 against float64


def relative_error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference||; inf for anything that is not finite."""
    difference, norm = (value.double() - reference.double()).norm().item(), reference.double().norm().item()
    error = difference / (norm or 1.0)
    return error if math.isfinite(error) else math.inf
