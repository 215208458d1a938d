"""A layer and a training step around the attention module: matrix products by their operations."""

from __future__ import annotations

from dataclasses import dataclass

from flashcp.simulator.cost import AttentionShape

__all__ = ["ModelShape", "layer_flops"]


@dataclass
class ModelShape:
    """What of a model decides a layer's time. ffn_dim 0: 8/3 of the width, rounded up to a multiple of 64 (SwiGLU)."""

    query_heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    dtype_bytes: int = 2
    layers: int = 32
    ffn_dim: int = 0


def layer_flops(shape: AttentionShape, ffn_dim: int, rows: float) -> float:
    """Operations of a layer's projections and its SwiGLU on so many rows, forward and backward.

    The width is query_heads x head_dim; ffn_dim 0: 8/3 of it, rounded up to a multiple of 64. A weight costs two
    operations a row forward and four backward.
    """
    dim, kv_dim = shape.query_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    width = ffn_dim or -(-8 * dim // 3 // 64) * 64
    return 6 * (2 * dim * dim + 2 * dim * kv_dim + 3 * dim * width) * rows
