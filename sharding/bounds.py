"""Lower bounds that hold for every plan of a window, and how far a plan is from them (docs/planner.md)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashcp.sharding.assignment import Assignment
from flashcp.sharding.route import Route

__all__ = ["Certificate", "certificate", "certify", "least_largest_work", "study_ceiling"]

LONGEST = 4  # documents whose tail is bounded
BLOCKS = 4096  # of rows, for that
PRICES = np.geomspace(0.25, 4.0, 17)
FEW_ROWS = 256  # rows a rank up to which single heavy rows can make balance impossible
TOLERANCE = 1.01  # imbalance that plans are compared under; `flashcp` plans for it


@dataclass(frozen=True)
class Certificate:
    """Proven lower bounds for one window, and what a plan reached.

    No plan whose ranks differ by at most one token has a smaller `largest_work` (causal pairs); none of those
    with imbalance at most `tolerance` has fewer `critical_rows` or `total_rows` (KV rows, exact exchange).
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
        """The plan's distance to each bound: causal pairs, critical rows, total rows; 0 is proven optimal."""
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
            shown = "" if reached is None else reached
            ratio = (
                "" if reached is None else "1.000" if reached == bound else f"{reached / bound:.3f}" if bound else "-"
            )
            lines.append(f"{name:>14} {bound:>15} {shown:>15} {ratio:>11}")
        return "\n".join(lines)


def certify(plan: Assignment) -> Certificate:
    """The window's bounds at the imbalance this plan reached (at least 1.01), with the plan's own numbers."""
    route = Route(plan, "exact")
    bounds = certificate(plan.document_lengths, plan.world_size, max(TOLERANCE, plan.imbalance))
    return Certificate(
        bounds.tolerance,
        bounds.largest_work,
        bounds.critical_rows,
        bounds.total_rows,
        int(plan.work.max()),
        int(route.critical_rows),
        int(route.received_rows.sum()),
    )


def certificate(document_lengths: np.ndarray, world_size: int, tolerance: float = TOLERANCE) -> Certificate:
    """Lower bounds for every plan of this window whose ranks differ by at most one token.

    document_lengths: int64 [documents]. tolerance: imbalance up to which the bounds on rows hold.
    """
    lengths = np.asarray(document_lengths, dtype=np.int64)
    tokens = int(lengths.sum())
    work_bound = least_largest_work(lengths, world_size)
    mean = int((lengths * (lengths + 1) // 2).sum()) / world_size
    work_limit = int(max(tolerance * mean * (1 + 1e-12), work_bound))  # the factor keeps rounding on the safe side
    rank_tokens = -(-tokens // world_size)
    total = least_total_rows(lengths, world_size, work_limit, rank_tokens)
    critical = max(-(-total // world_size), least_tail_rows(lengths, world_size, work_limit, rank_tokens))
    return Certificate(tolerance, work_bound, critical, total)


def study_ceiling(document_lengths: np.ndarray, world_size: int, tolerance: float = 1.02) -> float:
    """The study's bound on the saving: documents taken one by one, as if each had the window to itself.

    1 - critical / (T (N - 1)) with critical = max(longest - T, sum of the ends / N); 1.0 for one rank.
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
    return float(1 - critical / (rank_tokens * (world_size - 1)))


def least_largest_work(lengths: np.ndarray, world_size: int) -> int:
    """Some rank works at least this much: the mean, or k + 1 of the k N + 1 heaviest rows and the lightest rest."""
    total = int((lengths * (lengths + 1) // 2).sum())
    bound = -(-total // world_size)
    tokens = int(lengths.sum())
    fewest = tokens // world_size
    if fewest > FEW_ROWS or int(lengths.max()) * fewest <= bound:
        return bound
    ordered = np.sort(lengths)
    at_least = np.append(np.arange(len(ordered), 0, -1), 0)  # documents with a row of work x: those of length >= x
    rows = np.repeat(np.arange(1, ordered[-1] + 1), at_least[np.searchsorted(ordered, np.arange(1, ordered[-1] + 1))])
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
    work = lengths * (lengths + 1) // 2
    j = np.arange(1, world_size, dtype=np.int64)
    split = (lengths > rank_tokens) | (work > work_limit // 2)
    length, work = lengths[split], work[split]
    b = np.arange(world_size + 1)[:, None]
    beyond = np.minimum(j, b) * work_limit + np.maximum(0, j - b) * (work_limit // 2)
    least = np.zeros(world_size + 1, dtype=np.int64)  # over the documents so far, by big holdings given out
    for i in range(len(length)):
        most = int(min(world_size, work[i] // work_limit + 1))  # more big holdings change nothing
        cost = _ends(length[i], work[i], beyond[: most + 1], j * rank_tokens).sum(axis=-1)  # [big holdings]
        options = [np.append(np.full(k, _NEVER), least[: len(least) - k]) + cost[k] for k in range(most + 1)]
        least = np.min(options, axis=0)
    return int(least.min())


_NEVER = np.int64(1) << 60


def _ends(length: np.ndarray, work: np.ndarray, beyond: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Lowest end with at most `beyond` work and `rows` rows above it, int64 [..., len(rows)]."""
    by_work = smallest_end(np.maximum(np.asarray(work)[..., None] - beyond, 0))
    return np.maximum(np.maximum(np.asarray(length)[..., None] - rows, by_work), 0)


def least_tail_rows(lengths: np.ndarray, world_size: int, work_limit: int, rank_tokens: int) -> int:
    """max(sent, received) of the rank with a document's last row, for the longest documents.

    It receives at least length - n rows if it holds n rows of the document. A row y that it holds is read by every
    other rank with rows beyond y: no fewer than readers(y), what the work and the rows beyond y need, less itself.
    Low rows have many readers, high rows have much work. For any price p of work, the n cheapest rows by
    readers(y) + p (y + 1) cost no more than all it sends plus p times the work limit.
    """
    best = int(lengths.max()) - rank_tokens
    for length in np.sort(lengths)[::-1][:LONGEST].tolist():
        if length <= best:
            break
        block = -(-length // BLOCKS)  # rows that count as the cheapest of their block
        y = np.arange(0, length, block, dtype=np.int64)
        last = np.minimum(y + block, length)  # a block's fewest readers are those of its last row
        work_beyond = (length * (length + 1) - last * (last + 1)) // 2
        readers = np.maximum(-(-work_beyond // work_limit), -(-(length - last) // rank_tokens)) - 1
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
    end = np.sqrt(2.0 * np.asarray(work, dtype=np.float64)).astype(np.int64)
    end = np.maximum(end - 2, 0)
    for _ in range(4):
        end += end * (end + 1) // 2 < work
    return end
