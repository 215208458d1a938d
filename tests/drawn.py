"""What hypothesis draws: lengths, masks, layer mixes, packs of them, and plans that no strategy would make.

`make test` draws a few hundred of each; `--hypothesis-profile=thorough` draws thousands (CONTRIBUTING.md).
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

import flashcp
from flashcp.sharding.mask import CAUSAL, Mask
from flashcp.sharding.plan import ShardingPlan
from tests.sharding.test_masks import whole

Layers = list[tuple[Mask, int]]


class Pack(NamedTuple):
    """What a user plans for: lengths, a mask for all documents or one each, a layer mix or none, ranks."""

    lengths: list[int]
    masks: Mask | list[Mask]
    layers: Layers | None
    ranks: int

    @property
    def kinds(self) -> list[tuple[int | None, int | None, int]]:
        """Window, chunk and number of each kind of layer."""
        sized = [({mask.kind: mask.size}, count) for mask, count in self.layers or [(CAUSAL, 1)]]
        return [(size.get("window"), size.get("chunk"), count) for size, count in sized]

    def sees(self, window: int | None = None, chunk: int | None = None) -> np.ndarray:
        """Which row of the pack (second axis) each row sees in such a layer, one by one."""
        each = self.masks if isinstance(self.masks, list) else [self.masks] * len(self.lengths)
        return whole(self.lengths, each, window or 0, chunk or 0)

    def plan(self, strategy: str) -> ShardingPlan:
        options = {"budget": 60} if strategy == "flashcp" else {}
        return flashcp.plan(self.lengths, self.ranks, strategy, masks=self.masks, layers=self.layers, **options)

    def cut(self, shards: list[tuple[int, int, int, int]]) -> ShardingPlan:
        return ShardingPlan.from_shards(self.lengths, self.ranks, shards, self.masks, self.layers)


@st.composite
def masks(draw: st.DrawFn, rows: int) -> Mask:
    """Of a document of so many rows: every kind, sizes beyond the document, blocks anywhere."""
    kind = draw(st.sampled_from(["causal", "window", "chunk", "full", "prefix"]))
    size = draw(st.integers(1, rows + 5)) if kind in ("window", "chunk", "prefix") else None
    ends = draw(st.lists(st.integers(0, rows), max_size=6, unique=True)) if kind not in ("full", "prefix") else []
    touching = sorted(ends)
    blocks = [pair for pair in pairwise(touching) if draw(st.booleans())]
    return Mask(kind, size, blocks)


def fitting(chunks: set[int]) -> list[int]:
    """Sizes of a layer's chunk beside documents in such chunks: each is a multiple of the other."""
    return [size for size in range(1, 46) if all(max(size, own) % min(size, own) == 0 for own in chunks)]


@st.composite
def layer_mixes(draw: st.DrawFn, chunks: set[int]) -> Layers:
    """Layers for documents in such chunks, of which a layer's chunk must be a multiple or a part."""
    kinds = st.one_of(
        st.just(CAUSAL),
        st.integers(1, 45).map(lambda size: Mask("window", size)),
        st.sampled_from(fitting(chunks)).map(lambda size: Mask("chunk", size)),
    )
    return draw(st.lists(st.tuples(kinds, st.integers(1, 50)), min_size=1, max_size=3))


@st.composite
def packs(draw: st.DrawFn, tokens: int = 120, ranks: int = 6, with_masks: bool = True) -> Pack:
    """Up to six documents of together at most so many tokens."""
    most = draw(st.sampled_from([3, tokens // 6, tokens]))
    lengths = draw(st.lists(st.integers(1, most), min_size=1, max_size=6).filter(lambda each: sum(each) <= tokens))
    world_size = draw(st.integers(1, min(ranks, sum(lengths))))
    if not with_masks:
        return Pack(lengths, CAUSAL, None, world_size)
    each = [draw(masks(rows)) for rows in lengths] if draw(st.booleans()) else draw(masks(min(lengths)))
    chunks = {mask.size for mask in (each if isinstance(each, list) else [each]) if mask.kind == "chunk"}
    layers = draw(st.none() | layer_mixes(chunks))
    return Pack(lengths, each, layers, world_size)


@st.composite
def cut_anywhere(draw: st.DrawFn, pack: Pack, balanced: bool = False) -> ShardingPlan:
    """A plan no strategy would make: every document cut anywhere, pieces on any rank; balanced: ranks then differ by
    at most one row, as bounds ask."""
    pieces = []
    for document, length in enumerate(pack.lengths):
        cuts = sorted(draw(st.sets(st.integers(1, length), max_size=5)) | {0, length})
        pieces += [(document, start, stop) for start, stop in pairwise(cuts)]
    if not balanced:
        return pack.cut([(*piece, draw(st.integers(0, pack.ranks - 1))) for piece in pieces])
    shards, place, tokens = [], 0, sum(pack.lengths)
    for document, start, stop in draw(st.permutations(pieces)):
        ranks = (np.arange(place, place + stop - start) * pack.ranks // tokens).tolist()
        shards += [(document, row, row + 1, rank) for row, rank in zip(range(start, stop), ranks, strict=True)]
        place += stop - start
    return pack.cut(shards)
