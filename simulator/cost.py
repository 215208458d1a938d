"""What a plan costs on a machine: attention, copies, matrix products and exchanges, as arithmetic on plain arrays.

Attention is priced read by read: a query shard reads a KV range, either all of it or, where the range is the shard
itself, its causal half. A read costs its tiles' floating-point operations, the bytes of the KV rows it brings in (what
makes short queries slow: few operations a byte), and a fixed time a range. The parameters are linear in time, so they
can be fitted to measurements; `conf/cluster/` holds them with where they come from. gbps are 10^9 bytes a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flashcp.sharding.documents import MOST_TOKENS
from flashcp.sharding.mask import Mask
from flashcp.sharding.values import check_choice

FORWARD_FLOPS, BACKWARD_FLOPS = 4, 10
"""Useful operations of attention: a query-key pair, query head and dimension of the head."""


class AttentionShape(NamedTuple):
    """Heads and bytes of one attention layer."""

    query_heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    dtype_bytes: int = 2

    @property
    def kv_bytes(self) -> int:
        """Of one row's K and V."""
        return 2 * self.kv_heads * self.head_dim * self.dtype_bytes

    @property
    def query_bytes(self) -> int:
        """Of one row's Q and O."""
        return 2 * self.query_heads * self.head_dim * self.dtype_bytes


class ReadFeatures(NamedTuple):
    """What reads consist of, float64 arrays of one shape; a direction's time is linear in them.

    full_pairs, masked_pairs: query-key pairs of the tiles that need no mask and of those that do, padding counted.
    kv_rows, query_rows: rows brought in. ranges: KV ranges. All 0 where a range has no rows.
    """

    full_pairs: np.ndarray
    masked_pairs: np.ndarray
    kv_rows: np.ndarray
    query_rows: np.ndarray
    ranges: np.ndarray


def read_features(
    query_rows: np.ndarray,
    key_rows: np.ndarray,
    tiles: tuple[int, int],
    *,
    masked: bool = False,
    ranges: np.ndarray | int = 1,
) -> ReadFeatures:
    """Features of shards of `query_rows` that read `key_rows` each; the arrays broadcast.

    tiles: query rows and key rows of a tile; the second divides the first. masked: the range is the shard itself,
    read up to the diagonal (`key_rows` is then not looked at). ranges: how many ranges the key rows come in.
    """
    tile_q, tile_k = tiles
    query_rows = np.asarray(query_rows)
    count = -(-query_rows // tile_q)
    if masked:
        # Query tile i reads i tile_q keys in full and up to tile_q on the diagonal, in key tiles.
        full = count * (count - 1) // 2 * float(tile_q * tile_q)
        diagonal = -(-query_rows // tile_k) * float(tile_k * tile_q)
        rows = query_rows * 1.0
        return ReadFeatures(full, diagonal, rows, rows, np.ones_like(rows))
    key_rows = np.asarray(key_rows)
    some = key_rows > 0
    pairs = (count * tile_q) * (-(-key_rows // tile_k) * float(tile_k))
    nothing = np.zeros(pairs.shape)
    return ReadFeatures(pairs, nothing, key_rows + nothing, query_rows * some + nothing, ranges * some + nothing)


@dataclass(frozen=True)
class KernelCost:
    """One direction of an attention kernel.

    tflops: on full tiles. masked: time of a masked tile over a full one's. kv_gbps: a shard's KV rows are brought in
    once per read. query_gbps: Q comes in and O goes out once per kernel. merge_gbps: once per range, where partial
    results are merged in memory; 0 where merging costs nothing. range_us: per shard and range. launch_us: per kernel.
    """

    tflops: float
    kv_gbps: float
    query_gbps: float
    masked: float = 1.0
    merge_gbps: float = 0.0
    range_us: float = 0.0
    launch_us: float = 0.0


@dataclass(frozen=True)
class AttentionCost:
    """Attention forward and backward, cut in tiles of `tile_queries` x `tile_keys` rows.

    The backward moves twice the forward's bytes (gradients).
    """

    forward: KernelCost
    backward: KernelCost
    tile_queries: int = 128
    tile_keys: int = 64

    @property
    def tiles(self) -> tuple[int, int]:
        return self.tile_queries, self.tile_keys

    def read_us(self, reads: ReadFeatures, shape: AttentionShape, backward: bool = False) -> np.ndarray:
        """Time of each read, without what a kernel costs as a whole."""
        kernel, moved, flops = (self.backward, 2, BACKWARD_FLOPS) if backward else (self.forward, 1, FORWARD_FLOPS)
        pair_us = flops * shape.head_dim * shape.query_heads / (1e6 * kernel.tflops)
        time = pair_us * (reads.full_pairs + kernel.masked * reads.masked_pairs)
        time += reads.kv_rows * (moved * shape.kv_bytes / (1e3 * kernel.kv_gbps))
        if kernel.merge_gbps:
            time += reads.query_rows * (moved * shape.query_bytes / (1e3 * kernel.merge_gbps))
        if kernel.range_us:
            time += reads.ranges * kernel.range_us
        return time

    def query_us(self, query_rows: np.ndarray, shape: AttentionShape, backward: bool = False) -> np.ndarray:
        """Q in and O out of each shard, once a kernel."""
        kernel = self.backward if backward else self.forward
        return query_rows * ((2 if backward else 1) * shape.query_bytes / (1e3 * kernel.query_gbps))

    def launch_us(self, backward: bool = False) -> float:
        return (self.backward if backward else self.forward).launch_us


@dataclass(frozen=True)
class CopyCost:
    """Copies within a rank's memory. gbps: bytes read plus bytes written. launch_us: of one copy."""

    gbps: float
    launch_us: float = 0.0

    def us(self, moved_bytes: np.ndarray | float, launches: float = 1) -> np.ndarray:
        """Time to read and write so many bytes in all."""
        return np.asarray(moved_bytes) / (1e3 * self.gbps) + self.launch_us * launches


@dataclass(frozen=True)
class Link:
    """One direction of a rank's port: bytes it carries a second, and how long the first takes to arrive."""

    gbps: float
    latency_us: float

    def us(self, moved_bytes: np.ndarray | float) -> np.ndarray:
        return np.asarray(moved_bytes) / (1e3 * self.gbps) + self.latency_us


@dataclass(frozen=True)
class Links:
    """Every rank has a port to its node (NVLink) and one to the network (InfiniBand), each way.

    ranks_per_node: ranks 0 .. ranks_per_node - 1 are one node, and so on. multicast: a node's switch copies a row to
    several readers, so that it leaves its port once. shared_port: the ranks of a node have one network port together.
    """

    ranks_per_node: int
    node: Link
    network: Link
    multicast: bool = False
    shared_port: bool = False

    def nodes(self, world_size: int) -> np.ndarray:
        return np.arange(world_size) // self.ranks_per_node

    def collective_us(self, block_bytes: float, world_size: int) -> float:
        """All-gather or reduce-scatter of one block a rank, as rings: N - 1 blocks pass every port.

        Across nodes a node's network ports share the blocks: every rank that has one carries a ring of its own.
        """
        if world_size == 1:
            return 0.0
        link = self.node
        if world_size > self.ranks_per_node:
            ports = 1 if self.shared_port else self.ranks_per_node
            link = Link(min(self.node.gbps, self.network.gbps * ports), self.network.latency_us)
        return (world_size - 1) * float(link.us(block_bytes))

    def all_to_all_us(self, pair_bytes: float, world_size: int) -> float:
        """Every rank sends as many bytes to each other rank; both ports work at once."""
        if world_size == 1:
            return 0.0
        fewest = world_size % self.ranks_per_node or min(world_size, self.ranks_per_node)  # ranks of the last node
        near, far = fewest - 1, world_size - fewest
        if self.shared_port:  # the fullest node sends most
            far = max(n * (world_size - n) for n in (fewest, min(world_size, self.ranks_per_node)))
        return max(float(link.us(n * pair_bytes)) for link, n in ((self.node, near), (self.network, far)) if n)

    def neighbour(self, world_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Bytes a microsecond and latency from rank r - 1 to rank r, [world_size] each."""
        nodes = self.nodes(world_size)
        same = nodes == np.roll(nodes, 1)
        return (
            1e3 * np.where(same, self.node.gbps, self.network.gbps),
            np.where(same, self.node.latency_us, self.network.latency_us),
        )


@dataclass
class ModelShape:
    """What of a model decides a layer's time.

    width 0: query_heads x head_dim. ffn_dim 0: 8/3 of the width, rounded up to a multiple of 64 (SwiGLU).

    mask: of all documents, `causal` or `full`. narrowed_layers: how many of the layers look back no further than over
    `window` keys, or to the start of their chunk of so many; 0: no limit.
    """

    query_heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    dtype_bytes: int = 2
    layers: int = 32
    width: int = 0
    ffn_dim: int = 0
    mask: str = "causal"
    window: int = 0
    chunk: int = 0
    narrowed_layers: int = 0
    name: str = "mha-7b"

    def mix(self) -> tuple[Mask, list[tuple[Mask, int]] | None]:
        """Mask and layers as `flashcp.plan` takes them; None where no layer is narrowed. Raises ValueError for masks
        and numbers of layers that do not go together, and for both a window and a chunk."""
        check_choice("mask", self.mask, ("causal", "full"))
        for name, size in (("window", self.window), ("chunk", self.chunk)):
            if size > MOST_TOKENS:
                raise ValueError(f"{name}={size}: expected a whole number < 2**31")
        narrowed = f"narrowed_layers={self.narrowed_layers}"
        if self.narrowed_layers > self.layers:
            raise ValueError(f"{narrowed}: expected at most layers={self.layers}")
        if bool(self.narrowed_layers) != bool(self.window or self.chunk) or (self.window and self.chunk):
            raise ValueError(
                f"{narrowed} with window={self.window}, chunk={self.chunk}: expected one of the two, or none"
            )
        if self.mask != "causal" and self.narrowed_layers:
            raise ValueError(f"{narrowed} with mask={self.mask}: expected causal documents")
        if not self.narrowed_layers:
            return Mask(self.mask), None
        limited = Mask("window", self.window) if self.window else Mask("chunk", self.chunk)
        kinds = ((Mask(), self.layers - self.narrowed_layers), (limited, self.narrowed_layers))
        return Mask(self.mask), [(mask, layers) for mask, layers in kinds if layers]

    def __str__(self) -> str:
        """For captions: nobody shall read numbers of a model that he did not choose."""
        named = f"{self.name}, " if self.name else ""
        text = (
            f"{named}{self.layers} layers of {self.query_heads} query and {self.kv_heads} KV heads of {self.head_dim}"
        )
        if self.mask != "causal":
            text += f", {self.mask} attention"
        limits = [f"{size} keys {where}" for size, where in ((self.window, "back"), (self.chunk, "a chunk")) if size]
        if limits:
            text += f", {self.narrowed_layers} of them with {' and '.join(limits)}"
        return text


def layer_flops(shape: AttentionShape, ffn_dim: int, rows: float, width: int = 0) -> float:
    """Operations of a layer's projections and its SwiGLU on so many rows, forward and backward.

    width 0: query_heads x head_dim. ffn_dim 0: 8/3 of the width, rounded up to a multiple of 64. A weight costs two
    operations a row forward and four backward.
    """
    heads_dim, kv_dim = shape.query_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    width = width or heads_dim
    ffn_dim = ffn_dim or -(-8 * width // 3 // 64) * 64
    return 6 * (2 * width * heads_dim + 2 * width * kv_dim + 3 * width * ffn_dim) * rows
