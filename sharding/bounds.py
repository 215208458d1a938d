"""Lower bounds that hold for every plan of a window, and how far a plan is from them (docs/planner.md)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from flashcp.sharding.assignment import Assignment
from flashcp.sharding.documents import expand_ranges
from flashcp.sharding.exchanges import rows_of_layers
from flashcp.sharding.mask import NO_LIMIT
from flashcp.sharding.masks import Workload, read_workload
from flashcp.sharding.route import gathered_rows
from flashcp.sharding.shards import shard_work

LONGEST = 4  # documents whose tail is bounded
BLOCKS = 4096  # of rows, for that
PRICES = np.geomspace(0.25, 4.0, 17)
FEW_ROWS = 256  # rows a rank up to which single heavy rows can make balance impossible
TOLERANCE = 1.01  # imbalance that plans are compared under; `flashcp` plans for it
_NEVER = np.int64(1) << 60


@dataclass(frozen=True)
class Certificate:
    """Proven lower bounds for one window, and what a plan reached.

    No plan whose ranks differ by at most one token has a smaller `largest_work` (pairs); none of those
    with imbalance at most `tolerance` has fewer `critical_rows` or `total_rows` (KV rows, exact exchange).
    With a layer mix all are sums over its layers.
    `reached_*` are a plan's own numbers, None on a certificate of the window alone.
    """

    tolerance: float
    largest_work: int
    critical_rows: int
    total_rows: int
    reached_work: int | None = None
    reached_critical: int | None = None
    reached_total: int | None = None

    @property
    def gaps(self) -> tuple[int, int, int] | None:
        """The plan's distance to each bound: pairs, critical rows, total rows; 0 is proven optimal."""
        if self.reached_work is None or self.reached_critical is None or self.reached_total is None:
            return None
        return (
            self.reached_work - self.largest_work,
            self.reached_critical - self.critical_rows,
            self.reached_total - self.total_rows,
        )

    def __str__(self) -> str:
        lines = [f"{'':>14} {'bound':>15} {'plan':>15} {'plan/bound':>11}   (bounds at imbalance {self.tolerance:.3f})"]
        for name, bound, reached in (
            ("largest work", self.largest_work, self.reached_work),
            ("critical rows", self.critical_rows, self.reached_critical),
            ("total rows", self.total_rows, self.reached_total),
        ):
            ratio = ""
            if reached is not None:
                ratio = "1.000" if reached == bound else f"{reached / bound:.3f}" if bound else "-"
            lines.append(f"{name:>14} {bound:>15} {'' if reached is None else reached:>15} {ratio:>11}")
        return "\n".join(lines)


def certify(plan: Assignment) -> Certificate:
    """The window's bounds at the imbalance this plan reached (at least 1.01), with the plan's own numbers."""
    rows, tolerance = rows_of_layers(plan), max(TOLERANCE, plan.imbalance)
    return replace(
        certificate(plan.document_lengths, plan.world_size, tolerance, plan.workload),
        reached_work=int(plan.work.max()),
        reached_critical=rows.critical,
        reached_total=int(rows.received.sum()),
    )


def certificate(
    document_lengths: np.ndarray, world_size: int, tolerance: float = TOLERANCE, workload: Workload | None = None
) -> Certificate:
    """Lower bounds for every plan of this window whose ranks differ by at most one token.

    document_lengths: int64 [documents]. tolerance: imbalance up to which the bounds on rows hold. workload: masks and
    layer mix (None: causal); the bounds are then on the sums over all layers, and weaker: rows are bounded for layers
    and documents that look back to the document's start, as if these layers alone could fill a rank's work.
    """
    lengths = np.asarray(document_lengths, dtype=np.int64)
    workload = read_workload(lengths) if workload is None else workload
    work_bound = least_largest_work(lengths, world_size, workload)
    mean = int(workload.document_pairs.sum()) / world_size
    work_limit = int(max(tolerance * mean * (1 + 1e-12), work_bound))  # the factor keeps rounding on the safe side
    rank_tokens = -(-int(lengths.sum()) // world_size)
    critical = total = 0
    for masks, count in workload.kinds:
        to_start = (masks.window == NO_LIMIT) & (masks.chunk == NO_LIMIT)
        whole = np.zeros(len(lengths), dtype=bool)  # documents whose rows all see each other
        whole[masks.block_document[masks.block_stop - masks.block_start == lengths[masks.block_document]]] = True
        ends, read = lengths[to_start & ~whole], lengths[whole]
        limit = max(work_limit // count, 1)
        # Each holder of these reads all that it does not hold, and it takes so many to hold them.
        holders = np.minimum(np.maximum(-(-read // rank_tokens), -(-read * read // limit)), world_size)
        rows = int(((holders - 1) * read).sum())
        tail = int(read[holders > 1].max(initial=0)) - rank_tokens
        if len(ends):
            rows += least_total_rows(ends, world_size, limit, rank_tokens)
            tail = max(tail, least_tail_rows(ends, world_size, limit, rank_tokens))
        total += count * rows
        critical += count * max(-(-rows // world_size), tail)
    return Certificate(tolerance, work_bound, critical, total)


def study_ceiling(document_lengths: np.ndarray, world_size: int, tolerance: float = 1.02) -> float:
    """The study's bound on the saving: documents taken one by one, as if each had the window to itself.

    1 - critical / the all-gather's rows, with critical = max(longest - T, sum of the ends / N); 1.0 for one rank.
    """
    lengths = np.asarray(document_lengths, dtype=np.float64)
    if world_size == 1:
        return 1.0
    rank_tokens = lengths.sum() / world_size
    work = lengths * (lengths + 1) / 2
    limit = tolerance * work.sum() / world_size
    split = (lengths > rank_tokens) | (work > limit)
    j = np.arange(1, world_size)
    by_tokens = lengths[split, None] - j * rank_tokens
    by_work = (np.sqrt(np.maximum(1 + 8 * (work[split, None] - j * limit), 1)) - 1) / 2
    total = np.maximum(np.maximum(by_tokens, by_work), 0).sum()
    critical = max(lengths.max() - rank_tokens, total / world_size)
    return float(1 - critical / gathered_rows(int(lengths.sum()), world_size))


def least_largest_work(lengths: np.ndarray, world_size: int, workload: Workload | None = None) -> int:
    """Some rank works at least this much: the mean, or k + 1 of the k N + 1 heaviest rows and the lightest rest.

    workload: masks and layer mix; None is causal.
    """
    workload = read_workload(lengths) if workload is None else workload
    bound = -(-int(workload.document_pairs.sum()) // world_size)
    tokens = int(lengths.sum())
    fewest = max(1, tokens // world_size)  # of a rank that holds the heaviest row
    if fewest > FEW_ROWS or (workload.is_causal and int(lengths.max()) * fewest <= bound):
        return bound
    document, position = np.repeat(np.arange(len(lengths)), lengths), expand_ranges(0 * lengths, lengths)
    rows = np.sort(workload.pairs(document, position, position + 1))
    lightest = np.concatenate(([0], np.cumsum(rows[:fewest])))
    k = np.arange(fewest)
    return max(bound, int(((k + 1) * rows[tokens - 1 - k * world_size] + lightest[fewest - 1 - k]).max()))


def least_total_rows(lengths: np.ndarray, world_size: int, work_limit: int, rank_tokens: int) -> int:
    """All rows that travel: the sum of all ends but each document's last, for documents that compete for ranks.

    Of what ranks hold of documents, at most N holdings exceed half the work limit. A document with b such holdings
    has its j-th end from the last no lower than where the work beyond is min(j, b) limits and max(0, j - b) halves
    (nor below length - j * rank_tokens). The N big holdings are dealt to the documents so that the sum is least.
    With N big holdings for every document this would be the study's bound, which lets each have all ranks to itself.
    """
    work = shard_work(0, lengths)
    j = np.arange(1, world_size, dtype=np.int64)
    split = (lengths > rank_tokens) | (work > work_limit // 2)
    b = np.arange(world_size + 1)[:, None]
    beyond = np.minimum(j, b) * work_limit + np.maximum(0, j - b) * (work_limit // 2)
    least = np.zeros(world_size + 1, dtype=np.int64)  # over the documents so far, by big holdings given out
    for length, pairs in zip(lengths[split], work[split], strict=True):
        most = int(min(world_size, pairs // work_limit + 1))  # more big holdings change nothing
        by_work = smallest_end(np.maximum(pairs - beyond[: most + 1], 0))
        cost = np.maximum(np.maximum(length - j * rank_tokens, by_work), 0).sum(axis=-1)  # [big holdings]
        options = [np.append(np.full(k, _NEVER), least[: len(least) - k]) + cost[k] for k in range(most + 1)]
        least = np.min(options, axis=0)
    return int(least.min())


def least_tail_rows(lengths: np.ndarray, world_size: int, work_limit: int, rank_tokens: int) -> int:
    """max(sent, received) of the rank with a document's last row, for the longest documents.

    It receives at least length - n rows if it holds n rows of the document. A row y that it holds is read by every
    other rank with rows beyond y: no fewer than readers(y), what the work and the rows beyond y need, less itself.
    Low rows have many readers, high rows have much work. For any price p of work, the n cheapest rows by
    readers(y) + p (y + 1) cost no more than all it sends plus p times the work limit.
    """
    best = int(lengths.max()) - rank_tokens
    for length in np.sort(lengths)[::-1][:LONGEST]:
        if length <= best:
            break
        block = -(-length // BLOCKS)  # rows that count as the cheapest of their block
        y = np.arange(0, length, block, dtype=np.int64)
        last = np.minimum(y + block, length)  # a block's fewest readers are those of its last row
        readers = np.maximum(-(-shard_work(last, length) // work_limit), -(-(length - last) // rank_tokens)) - 1
        readers = np.clip(readers, 0, world_size - 1)
        rows = np.arange(1, len(y) + 1) * block
        for price in (readers[0] / length) * PRICES:
            sends = np.cumsum(np.sort(readers + price * (y + 1))) * block - price * work_limit
            # Holding fewer than `rows`, it receives more than length - rows; holding as many, it sends `sends`.
            bounds = np.minimum(length - rows + 1, np.floor(sends * (1 - 1e-9) - 1).astype(np.int64))
            best = max(best, int(bounds.max()))
    return best


def smallest_end(work: np.ndarray) -> np.ndarray:
    """Smallest e with e (e + 1) / 2 >= work, int64: the float root, corrected to the exact whole number."""
    end = np.maximum(np.sqrt(2.0 * np.asarray(work, dtype=np.float64)).astype(np.int64) - 2, 0)
    for _ in range(4):
        end += shard_work(0, end) < work
    return end
