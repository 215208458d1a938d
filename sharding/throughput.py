"""Attention throughput by KV length: the constants behind `wlb_adaptive`'s choice.

Points: FlashAttention-3's causal bf16 forward, head_dim 128, on one H200 as its users report it. Nothing is
published below 1,024 rows; there the throughput is taken as proportional to the rows, which is our assumption.
Only ratios matter: the table decides between two plans and predicts no time that anybody is shown.
"""

from __future__ import annotations

import numpy as np

__all__ = ["TILE_ROWS", "relative_time"]

TILE_ROWS = 128
_KV_ROWS = (0, 1024, 4096, 16384)
_TFLOPS = (0.0, 511.0, 690.0, 695.0)


def relative_time(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Predicted time of the queries start..stop of a document, in arbitrary units (WLB-LLM, section 5.3).

    Query rows are padded to the 128-row tile; the pairs they touch are divided by the throughput at `stop` KV rows.
    """
    padded = -(-(stop - start) // TILE_ROWS) * TILE_ROWS
    return padded * (start + (padded + 1) / 2) / np.interp(stop, _KV_ROWS, _TFLOPS)
