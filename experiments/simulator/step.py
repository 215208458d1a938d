"""A layer and a training step around the attention module: matrix products by their operations."""

from __future__ import annotations

from flashcp.experiments.simulator.machine import Machine
from flashcp.sharding.cost import AttentionShape

__all__ = ["gemm_ms"]


def gemm_ms(machine: Machine, shape: AttentionShape, ffn_dim: int, rows: float) -> float:
    """Forward and backward of a layer's projections and its SwiGLU for a rank's rows.

    The width is query_heads x head_dim; ffn_dim 0: 8/3 of it, rounded up to a multiple of 64. A weight costs two
    operations a row forward and four backward. Norms, embeddings, the loss and the optimizer are not counted.
    """
    dim, kv_dim = shape.query_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    width = ffn_dim or -(-8 * dim // 3 // 64) * 64
    weights = 2 * dim * dim + 2 * dim * kv_dim + 3 * dim * width
    return 6 * weights * rows / (1e9 * machine.gemm_tflops)
