"""What a user says about masks: of a document, and of a model's layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from flashcp.sharding.documents import MOST_TOKENS
from flashcp.sharding.values import check_choice, is_whole, read_list, shown

KINDS = ("causal", "window", "chunk", "full", "prefix")
SIZED = ("window", "chunk", "prefix")
NO_LIMIT = 0  # of a window, a chunk: none
MOST_LAYERS = 2**16


@dataclass(frozen=True, init=False)
class Mask:
    """The mask of a document, for row q of n:

        Mask("causal")            keys 0 .. q
        Mask("window", w)         keys q - w + 1 .. q                  (Mistral 7B, Gemma, gpt-oss)
        Mask("chunk", c)          keys c * (q // c) .. q               (Llama 4)
        Mask("full")              keys 0 .. n - 1                      (encoders, images, clips)
        Mask("prefix", p)         the first p rows see each other, the others are causal
        Mask("causal", blocks=[(start, stop), ...])  rows of a block see all of it too; also for a window or chunk

    A prefix is a block from 0 to p, or to the document's end where that comes first. Raises ValueError for other kinds,
    sizes below 1, and blocks that are empty, overlap, or stand beside `full` and `prefix`.
    """

    kind: str
    size: int
    blocks: tuple[tuple[int, int], ...]

    def __init__(self, kind: str = "causal", size: int | None = None, blocks: Iterable[Sequence[int]] = ()) -> None:
        check_choice("mask", kind, KINDS)
        if kind in SIZED and not (is_whole(size) and 1 <= size <= MOST_TOKENS):  # type: ignore[operator]
            raise ValueError(f"Mask({kind!r}, {shown(size)}): expected a whole number of rows >= 1 and < 2**31")
        if kind not in SIZED and size is not None:
            raise ValueError(f"Mask({kind!r}, {shown(size)}): expected no size")
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "size", int(size or 0))
        object.__setattr__(self, "blocks", _read_blocks(kind, blocks))

    @property
    def is_causal(self) -> bool:
        """Whether it is plain causal attention."""
        return self.kind == "causal" and not self.blocks

    def __repr__(self) -> str:
        size = f", {self.size}" if self.kind in SIZED else ""
        return f"Mask({self.kind!r}{size}{f', blocks={list(self.blocks)}' if self.blocks else ''})"


class LayerKind(NamedTuple):
    """Layers of a model that narrow the documents' masks alike: how far they look back, and how many there are."""

    window: int
    chunk: int
    layers: int


def count_layers(masks: Iterable[Mask]) -> list[tuple[Mask, int]] | None:
    """The mix of layers of which each has one of these masks, as `flashcp.plan(layers=)` takes it; None where all are
    causal."""
    mix = list(Counter(masks).items())
    return None if all(mask.is_causal for mask, _ in mix) else mix


def read_layers(layers: Iterable[tuple[Mask, int]] | None) -> tuple[LayerKind, ...]:
    """A layer mix: [(mask, how many layers have it), ...], causal, window or chunk. None: no mix.

    Raises ValueError for anything else: what is seen beside the past belongs to a document, not to a layer.
    """
    if layers is None:
        return ()
    expected = "[(flashcp.Mask, how many), ...]"
    wrong = ValueError(f"layers={shown(layers)}: expected {expected}")
    kinds = []
    for pair in read_list("layers", layers, expected, MOST_LAYERS):
        mask, count = _read_pair(pair, wrong)
        if not isinstance(mask, Mask) or not is_whole(count) or not 1 <= count <= MOST_LAYERS:
            raise wrong
        if mask.kind not in ("causal", "window", "chunk") or mask.blocks:
            raise ValueError(
                f"layers: {mask}: expected causal, window or chunk; give blocks, full and prefix as masks="
            )
        sizes = {kind: mask.size if mask.kind == kind else NO_LIMIT for kind in ("window", "chunk")}
        kinds.append(LayerKind(sizes["window"], sizes["chunk"], int(count)))
    if not kinds:
        raise wrong
    return tuple(kinds)


def _read_pair(pair: Any, wrong: ValueError) -> tuple[Any, Any]:
    """Two things. Raises `wrong` for anything else."""
    try:
        first, second = pair
    except Exception:  # what a caller iterates over may raise anything
        raise wrong from None
    return first, second


def _read_blocks(kind: str, blocks: Iterable[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    expected = "[(start, stop), ...] with 0 <= start < stop < 2**31"
    wrong = ValueError(f"Mask({kind!r}, blocks={shown(blocks)}): expected {expected}")
    pairs = [_read_pair(pair, wrong) for pair in read_list(f"Mask({kind!r}) blocks", blocks, expected)]
    if not all(is_whole(start) and is_whole(stop) and 0 <= start < stop <= MOST_TOKENS for start, stop in pairs):
        raise wrong
    pairs.sort()
    if pairs and kind in ("full", "prefix"):
        raise ValueError(f"Mask({kind!r}, blocks=...): expected blocks of causal, window or chunk masks")
    for (_, stop), (start, _) in pairwise(pairs):
        if start < stop:
            raise ValueError(f"Mask({kind!r}, blocks={shown(pairs)}): expected blocks that do not overlap")
    return tuple((int(start), int(stop)) for start, stop in pairs)


CAUSAL = Mask()
