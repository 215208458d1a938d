"""`flashcp_paper`: Algorithm 1 of the FlashCP paper (arXiv 2606.08476), whole documents first.

Place documents whole, longest first, each on the rank with the least work; move rows until tokens are equal; if the
imbalance exceeds the target, cut the longest remaining document 2N ways (PerDoc) and start again. Under masks or a
layer mix, which the paper does not have, the one with most work stands for the longest.

The paper leaves these open; here is what we chose:

- target imbalance R: 1.05.
- ties: the lower rank, the earlier document.
- how a popped document is cut: a head leaves (x rows, x^2/2 work, x rows of KV; a tail would drag the whole prefix
  along, `leaves="tail"` shows how far), at most a quarter of the piece at a time, longest pieces first: several
  documents a little rather than one a lot. A document of one row moves whole.
- where rows go: from the rank with the largest surplus to the rank with the largest deficit, as many as both allow.
- tokens that N does not divide: the ranks that hold most keep one row more; nothing is rounded to tiles.
- documents left over: those in PerDoc deal their odd rows round robin, as `per_document` does.
- time: after 64 restarts PerDoc grows by an eighth at a time. If no attempt reaches R, the best imbalance wins.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np

from flashcp.sharding.documents import sum_by
from flashcp.sharding.masks import Workload, read_workload
from flashcp.sharding.shards import ShardTable
from flashcp.sharding.strategies.equal_pieces import per_document
from flashcp.sharding.values import check_choice, read_number

TARGET_IMBALANCE = 1.05
SINGLE_STEPS = 64  # restarts that each add one document to PerDoc

Piece = tuple[int, int, int]  # document, start, stop
Heap = list[tuple[int, ...]]


class Attempt(NamedTuple):
    """One pass of the algorithm: whole documents and their cut heads per rank, PerDoc's shards, the imbalance."""

    pieces: list[list[Piece]]
    per_document: ShardTable
    imbalance: float

    def table(self) -> ShardTable:
        flat = [(*piece, rank) for rank, held in enumerate(self.pieces) for piece in held]
        columns = np.array(flat, dtype=np.int64).reshape(len(flat), 4).T
        return ShardTable(*map(np.concatenate, zip(self.per_document, columns, strict=True)))


def flashcp_paper(
    document_lengths: np.ndarray,
    world_size: int,
    target_imbalance: float = TARGET_IMBALANCE,
    leaves: str = "head",
    workload: Workload | None = None,
) -> ShardTable:
    """The paper's heuristic. leaves: which end of a cut document moves, `head` or `tail`. workload: None is causal.

    Raises ValueError for a target below 1 and for other ends.
    """
    read_number("target_imbalance", target_imbalance, lambda number: number >= 1, "a number >= 1")
    check_choice("leaves", leaves, ("head", "tail"))
    workload = read_workload(document_lengths) if workload is None else workload.reduced
    heaviest_first = np.argsort(-workload.document_pairs, kind="stable")
    best: Attempt | None = None
    cut = restarts = 0
    while True:
        attempt = try_cut(document_lengths, heaviest_first, cut, world_size, workload, leaves)
        if best is None or attempt.imbalance < best.imbalance:
            best = attempt
        if best.imbalance <= target_imbalance or cut == len(document_lengths):
            return best.table()
        restarts += 1
        cut = min(len(document_lengths), cut + (1 if restarts <= SINGLE_STEPS else max(1, cut // 8)))


def try_cut(
    lengths: np.ndarray,
    heaviest_first: np.ndarray,
    cut: int,
    world_size: int,
    workload: Workload,
    leaves: str = "head",
) -> Attempt:
    """Cut the `cut` heaviest documents 2N ways, place the others whole, equalise tokens."""
    chosen = heaviest_first[:cut]
    striped = ShardTable(*np.empty((4, 0), dtype=np.int64))
    if cut:
        striped = per_document(lengths[chosen], world_size)
        striped = striped._replace(document=chosen[striped.document])
    amounts = (striped.rows, workload.pairs(*striped[:3]))
    tokens, work = (sum_by(striped.rank, amount, world_size).tolist() for amount in amounts)

    pieces: list[list[Piece]] = [[] for _ in range(world_size)]
    least = [(amount, rank) for rank, amount in enumerate(work)]
    heapq.heapify(least)
    pairs = workload.document_pairs.tolist()
    for document in heaviest_first[cut:].tolist():
        length = int(lengths[document])
        amount, rank = least[0]
        pieces[rank].append((document, 0, length))
        tokens[rank] += length
        work[rank] = amount + pairs[document]
        heapq.heapreplace(least, (work[rank], rank))

    _equalise_tokens(pieces, tokens, work, leaves == "tail")
    if not workload.is_causal:
        table = Attempt(pieces, striped, 0.0).table()
        work = sum_by(table.rank, workload.pairs(*table[:3]), world_size).tolist()
    return Attempt(pieces, striped, max(work) * world_size / sum(work))


def _equalise_tokens(pieces: list[list[Piece]], tokens: list[int], work: list[int], tails: bool) -> None:
    """Move heads (or tails) from ranks with too many tokens to ranks with too few, in place; work is the causal one."""
    world_size = len(tokens)
    share, longer = divmod(sum(tokens), world_size)
    surplus = [count - share for count in tokens]
    for rank in sorted(range(world_size), key=lambda rank: (-tokens[rank], rank))[:longer]:
        surplus[rank] -= 1
    givers: Heap = [(-amount, rank) for rank, amount in enumerate(surplus) if amount > 0]
    takers: Heap = [(amount, rank) for rank, amount in enumerate(surplus) if amount < 0]
    heapq.heapify(givers)
    heapq.heapify(takers)
    whole: list[Heap] = [[(start - stop, document, start) for document, start, stop in held] for held in pieces]
    for _, rank in givers:
        heapq.heapify(whole[rank])
    moved: list[list[Piece]] = [[] for _ in pieces]
    while givers:
        (spare, giver), (missing, taker) = givers[0], takers[0]
        left = rows = min(-spare, -missing)
        while left:
            negative, document, start = whole[giver][0]
            part = min(left, max(1, -negative // 4))
            first = start - negative - part if tails else start
            moved[taker].append((document, first, first + part))
            pairs = (2 * first + part + 1) * part // 2
            work[giver] -= pairs
            work[taker] += pairs
            left -= part
            _replace_first(whole[giver], (negative + part, document, start if tails else start + part))
        _replace_first(givers, (spare + rows, giver))
        _replace_first(takers, (missing + rows, taker))
    for rank, kept in enumerate(whole):
        pieces[rank] = [(document, start, start - negative) for negative, document, start in kept] + moved[rank]


def _replace_first(heap: Heap, item: tuple[int, ...]) -> None:
    """Put the item in the place of the smallest one; where its amount is used up, nothing."""
    if item[0]:
        heapq.heapreplace(heap, item)
    else:
        heapq.heappop(heap)
