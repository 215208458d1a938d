"""Masks: which keys of its own document a query row sees. Always one interval whose ends never go back.

Row q of a document of n rows sees the rows lowest(q) <= key < past(q). Three things make the interval: how far it looks
back (to the document's start, over a window, or to the start of its chunk), its own row, and blocks, whose rows see
all of the block and what any of them would see without it. Everything else follows from the two ends by counting.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd
from typing import Any

import numpy as np

from flashcp.sharding.documents import expand_ranges
from flashcp.sharding.mask import MOST_LAYERS, NO_LIMIT, LayerKind, Mask, read_layers
from flashcp.sharding.shards import shard_work
from flashcp.sharding.values import read_list, shown


@dataclass(frozen=True, eq=False)
class Masks:
    """The masks of a pack's documents as arrays; int64 all.

    length, window, chunk [documents]: a window or chunk of 0 sets no limit. block_document, block_start, block_stop
    [blocks]: sorted by document and start; a document of `full` or `prefix` has one block from its start.
    Methods take arrays that broadcast: documents, and rows of them from 0 to the document's length.
    """

    length: np.ndarray
    window: np.ndarray
    chunk: np.ndarray
    block_document: np.ndarray
    block_start: np.ndarray
    block_stop: np.ndarray

    @cached_property
    def is_causal(self) -> bool:
        """Whether every document is plain causal."""
        return not (self.window.any() or self.chunk.any() or len(self.block_document))

    @cached_property
    def is_full(self) -> bool:
        """Whether in every document all rows see each other."""
        return np.array_equal(self.block_stop - self.block_start, self.length)

    @cached_property
    def longest_block(self) -> int:
        """Rows of it; 0 where there is none."""
        return int((self.block_stop - self.block_start).max(initial=0))

    def lowest(self, document: np.ndarray, row: np.ndarray) -> np.ndarray:
        """The first key that a row sees."""
        block = self._block_of(document, row)
        start = np.append(self.block_start, 0)[block]
        back = self._looks_back(document, row)
        return np.where(block < len(self.block_start), np.minimum(back, start), back)

    def past(self, document: np.ndarray, row: np.ndarray) -> np.ndarray:
        """One more than the last key that a row sees."""
        block = self._block_of(document, row)
        return np.where(block < len(self.block_start), np.append(self.block_stop, 0)[block], row + 1)

    def first_reader(self, document: np.ndarray, key: np.ndarray) -> np.ndarray:
        """The first row that sees a key."""
        block = self._block_of(document, key)
        return np.where(block < len(self.block_start), np.append(self.block_start, 0)[block], key)

    def past_reader(self, document: np.ndarray, key: np.ndarray) -> np.ndarray:
        """One more than the last row that sees a key."""
        document, key = np.broadcast_arrays(document, key)
        window, chunk = self.window[document], self.chunk[document]
        last = self.length[document]
        last = np.where(window > 0, np.minimum(last, key + window), last)
        last = np.where(chunk > 0, np.minimum(last, (key // np.maximum(chunk, 1) + 1) * chunk), last)
        block = self._block_of(document, key)
        return np.where(block < len(self.block_start), np.maximum(last, np.append(self.block_stop, 0)[block]), last)

    def pairs_below(self, document: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Query-key pairs of all rows of the document below `row`."""
        document, row = np.broadcast_arrays(document, row)
        if self.is_full:
            return row * self.length[document]
        pairs = self._pairs_back(document, row)
        if not len(self.block_document):
            return pairs
        # Blocks that end at the row or before it count in full, one that holds the row up to it.
        at = self._blocks_before(document, row)
        whole = np.concatenate(([0], np.cumsum(self._added)))
        first = np.searchsorted(self.block_document, document)
        pairs = pairs + whole[at] - whole[first]
        open_ = np.maximum(at - 1, 0)
        inside = (at > first) & (self.block_stop[open_] > row)
        return pairs - np.where(inside, self._added[open_] - self._added_below(open_, row), 0)

    def pairs(self, document: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Query-key pairs of the rows start..stop (stop excluded) of a document."""
        return self.pairs_below(document, stop) - self.pairs_below(document, start)

    def narrow(self, window: int = NO_LIMIT, chunk: int = NO_LIMIT) -> Masks:
        """The masks of a layer that looks back no further than that; what rows of a block see of it stays.

        Raises ValueError for chunks of which neither divides the other: both together are no chunks.
        """
        if not window and not chunk:
            return self
        if chunk and (np.maximum(self.chunk, chunk) % np.where(self.chunk > 0, np.minimum(self.chunk, chunk), 1)).any():
            raise ValueError(
                f"chunk={chunk} of documents in chunks of {self.chunk.max()}: expected one that divides the other"
            )
        limits = [_smaller(own, layer) for own, layer in ((self.window, window), (self.chunk, chunk))]
        limits = [np.where(limit < self.length, limit, NO_LIMIT) for limit in limits]
        return replace(self, window=limits[0], chunk=limits[1])

    def take(self, documents: np.ndarray) -> Masks:
        """The masks of some documents, in that order."""
        first = np.searchsorted(self.block_document, documents)
        count = np.searchsorted(self.block_document, documents, side="right") - first
        block = expand_ranges(first, count)
        return Masks(
            self.length[documents], self.window[documents], self.chunk[documents],
            np.repeat(np.arange(len(documents)), count), self.block_start[block], self.block_stop[block],
        )  # fmt: skip

    @cached_property
    def _code(self) -> np.ndarray:
        """Where blocks begin, one number each in the order of documents and rows."""
        return (self.block_document << 31) + self.block_start

    def _blocks_before(self, document: np.ndarray, row: np.ndarray) -> np.ndarray:
        """How many blocks begin at the row or before it, those of earlier documents counted."""
        return np.searchsorted(self._code, (np.asarray(document, dtype=np.int64) << 31) + row, side="right")

    def _block_of(self, document: np.ndarray, row: np.ndarray) -> np.ndarray:
        """The block that holds a row; the number of all blocks where none does."""
        last = self._blocks_before(document, row) - 1
        if not len(self.block_start):
            return last + 1
        inside = (last >= 0) & (self.block_document[last] == document) & (row < self.block_stop[last])
        return np.where(inside, last, len(self.block_start))

    def _looks_back(self, document: np.ndarray, row: np.ndarray) -> np.ndarray:
        """The first key that a row sees without its block."""
        window, chunk = self.window[document], self.chunk[document]
        over_window = np.where(window > 0, np.maximum(row - window + 1, 0), 0)
        return np.maximum(over_window, _chunk_start(row, chunk))

    def _pairs_back(self, document: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Pairs of the rows below `row`, without blocks."""
        window, chunk = self.window[document], self.chunk[document]
        whole = np.where(chunk > 0, row // np.maximum(chunk, 1), 0)
        return whole * _pairs_in_window(chunk, window) + _pairs_in_window(row - whole * chunk, window)

    @cached_property
    def _added(self) -> np.ndarray:
        """Pairs that each block adds."""
        return self._added_below(np.arange(len(self.block_start)), self.block_stop)

    def _added_below(self, block: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Pairs that a block adds to its rows below `row`: keys behind each, and keys of it beyond how far it looks."""
        document, start, stop = self.block_document[block], self.block_start[block], self.block_stop[block]
        rows = row - start
        behind = rows * (stop - 1 - start) - rows * (rows - 1) // 2
        window, chunk = self.window[document], self.chunk[document]
        # The first row that looks back no further than the block's start: from there on keys of the block are added.
        blind = np.where(window > 0, start + window - 1, stop)
        blind = np.minimum(blind, np.where(chunk > 0, -(-start // np.maximum(chunk, 1)) * chunk, stop))
        blind = np.minimum(np.maximum(blind, start), row)

        def looked(x: np.ndarray) -> np.ndarray:
            """Sum over the rows below x of the first key that each sees without its block."""
            return x * (x + 1) // 2 - self._pairs_back(document, x)

        return behind + looked(row) - looked(blind) - start * (row - blind)


def list_masks(masks: Iterable[Mask]) -> list[Mask]:
    """One mask for each document. Raises ValueError for what is none."""
    expected = "a flashcp.Mask, or a list with one for each document"
    given = read_list("masks", masks, expected)
    if not all(isinstance(mask, Mask) for mask in given):
        raise ValueError(f"masks={shown(masks)}: expected {expected}")
    return given  # type: ignore[return-value]


def read_masks(masks: Mask | Sequence[Mask] | None, document_lengths: np.ndarray) -> Masks:
    """The masks of a pack: one for all documents, or one each; None is causal.

    A window or chunk that the document fits in sets no limit, a block of one row adds nothing: both are left out, so
    that equal masks are equal arrays. Raises ValueError for anything else, and for blocks beyond their document.
    """
    lengths = np.asarray(document_lengths, dtype=np.int64)
    if masks is None or isinstance(masks, Mask):
        kinds, which = [masks or Mask()], np.zeros(len(lengths), dtype=np.int64)
    else:
        given = list_masks(masks)
        if len(given) != len(lengths):
            raise ValueError(f"{len(given)} masks for {len(lengths)} documents: expected one for each, or one for all")
        kinds = list(dict.fromkeys(given))
        number = {mask: i for i, mask in enumerate(kinds)}
        which = np.array([number[mask] for mask in given], dtype=np.int64)

    def sizes(kind: str) -> np.ndarray:
        size = np.array([mask.size if mask.kind == kind else NO_LIMIT for mask in kinds], dtype=np.int64)[which]
        return np.where(size < lengths, size, NO_LIMIT)

    blocks = [np.empty((0, 3), dtype=np.int64)]
    by_kind = np.split(np.argsort(which, kind="stable"), np.cumsum(np.bincount(which, minlength=len(kinds)))[:-1])
    for mask, documents in zip(kinds, by_kind, strict=True):
        for start, stop in (
            ((0, None),) if mask.kind == "full" else ((0, mask.size),) * (mask.kind == "prefix") + mask.blocks
        ):
            stops = lengths[documents] if stop is None else np.full(len(documents), stop)
            if mask.kind == "prefix":
                stops = np.minimum(stops, lengths[documents])
            beyond = stops > lengths[documents]
            if beyond.any():
                where = int(documents[np.argmax(beyond)])
                raise ValueError(
                    f"block ({start}, {stop}) in document {where} of {lengths[where]} tokens: expected it inside"
                )
            blocks.append(np.stack((documents, np.full_like(documents, start), stops), axis=1))
    table = np.concatenate(blocks)
    table = table[table[:, 2] - table[:, 1] > 1]
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    return Masks(lengths, sizes("window"), sizes("chunk"), *table.T.copy())


@dataclass(frozen=True, eq=False)
class Workload:
    """What is computed on a pack: the documents' masks, and the model's layer mix; (): each layer is like the masks."""

    masks: Masks
    layers: tuple[LayerKind, ...] = ()

    @cached_property
    def is_causal(self) -> bool:
        return not self.layers and self.masks.is_causal

    @cached_property
    def columns(self) -> tuple[np.ndarray, ...]:
        """What tells workloads of the same lengths apart."""
        layers = np.array(self.layers, dtype=np.int64).reshape(-1, 3)
        masks = self.masks
        return masks.window, masks.chunk, masks.block_document, masks.block_start, masks.block_stop, layers

    @cached_property
    def kinds(self) -> tuple[tuple[Masks, int], ...]:
        """The masks of each kind of layer, and how many layers have them."""
        return tuple((self.masks.narrow(*kind[:2]), kind.layers) for kind in self.layers) or ((self.masks, 1),)

    @cached_property
    def reduced(self) -> Workload:
        """The same shares of work in the fewest kinds and layers: what a plan is made for."""
        found: dict[bytes, LayerKind] = {}
        for kind, (masks, count) in zip(self.layers, self.kinds, strict=False):
            key = masks.window.tobytes() + masks.chunk.tobytes()
            found[key] = kind._replace(layers=count + (found[key].layers if key in found else 0))
        if len(found) < 2:
            return Workload(self.kinds[0][0])
        divisor = gcd(*(kind.layers for kind in found.values()))
        return Workload(self.masks, tuple(kind._replace(layers=kind.layers // divisor) for kind in found.values()))

    @cached_property
    def document_pairs(self) -> np.ndarray:
        """Query-key pairs of each document, in all layers together, int64 [documents]."""
        return self.pairs(np.arange(len(self.masks.length)), np.zeros_like(self.masks.length), self.masks.length)

    def pairs_below(self, document: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Query-key pairs of all rows of the document below `row`, in all layers together."""
        return sum(count * masks.pairs_below(document, row) for masks, count in self.kinds)  # type: ignore[return-value]

    def pairs(self, document: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """The same of the rows start..stop (stop excluded)."""
        if self.is_causal:
            return shard_work(start, stop)
        return self.pairs_below(document, stop) - self.pairs_below(document, start)


def read_workload(
    document_lengths: np.ndarray,
    masks: Mask | Sequence[Mask] | None = None,
    layers: Iterable[tuple[Mask, int]] | None = None,
) -> Workload:
    """Masks and layers as `flashcp.plan` takes them. Raises ValueError for what is none, and for work beyond int64."""
    return _check_work(Workload(read_masks(masks, document_lengths), read_layers(layers)))


def _check_work(workload: Workload) -> Workload:
    """The workload. Raises ValueError for pairs beyond int64."""
    document_lengths = workload.masks.length
    most = float(document_lengths.sum()) ** 2 * sum(kind.layers for kind in workload.layers)
    if most > 2**62:
        raise ValueError(f"{document_lengths.sum()} tokens through {most:.0e} pairs: expected fewer tokens or layers")
    return workload


def workload_from(document_lengths: np.ndarray, columns: Sequence[list[Any]]) -> Workload:
    """The workload that has these `columns`. Raises ValueError for what no masks and layers give."""
    given = [np.array(column) for column in columns]
    if len(given) != 6 or any(column.size and column.dtype != np.int64 for column in given):
        raise ValueError("masks or layers that are not six lists of whole numbers")
    window, chunk, document, start, stop, layers = (column.astype(np.int64) for column in given)
    next_one = np.flatnonzero(document[1:] == document[:-1])
    fits = (
        window.shape == chunk.shape == document_lengths.shape
        and document.shape == start.shape == stop.shape == (document.size,)
        and ((np.minimum(window, chunk) >= 0) & (np.maximum(window, chunk) < document_lengths)).all()
        and (np.diff(document) >= 0).all()
        and ((document >= 0) & (document < len(document_lengths))).all()
        and ((start >= 0) & (start < stop - 1)).all()
        and (stop <= document_lengths[document]).all()
        and (start[next_one + 1] >= stop[next_one]).all()
        and (layers.size == 0 or (layers.ndim == 2 and layers.shape[1] == 3 and (layers >= (0, 0, 1)).all()))
        and (layers.size == 0 or (layers[:, 2] <= MOST_LAYERS).all())
    )
    if not fits:
        raise ValueError("masks or layers that no plan has")
    masks = Masks(document_lengths, window, chunk, document, start, stop)
    return _check_work(Workload(masks, tuple(LayerKind(*kind) for kind in layers.reshape(-1, 3).tolist())))


def _smaller(sizes: np.ndarray, size: int) -> np.ndarray:
    """The smaller of two limits, of which 0 is none."""
    return np.where(sizes == 0, size, np.minimum(sizes, size)) if size else sizes


def _chunk_start(row: np.ndarray, chunk: np.ndarray) -> np.ndarray:
    return np.where(chunk > 0, row - row % np.maximum(chunk, 1), 0)


def _pairs_in_window(rows: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Pairs of so many rows, the first of which sees itself alone."""
    full = np.where(window > 0, np.minimum(rows, window), rows)
    return full * (full + 1) // 2 + (rows - full) * full
