"""Packs to batches: plans are made and rows picked in a background thread, ahead of the step."""

from __future__ import annotations

import multiprocessing
import threading
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from flashcp.kernels.uploads import to_device
from flashcp.sharding.holders import positions_of_rank, rows_of_rank
from flashcp.sharding.masks import Workload, read_masks
from flashcp.sharding.plan import ShardingPlan
from flashcp.train.data.documents import Position
from flashcp.train.data.windows import TokenWindow, join_windows

MakePlan = Callable[[np.ndarray], ShardingPlan]


@dataclass(frozen=True)
class Batch:
    """Some windows, one pack for each replica, as one rank sees them.

    tokens, labels, position_ids: this rank's rows in the plan's local order, of its holder's its share, int64 [rank's
    tokens]; positions count from 0 in each document of the pack. plan, planned: of the replica's whole pack.
    The others are of all replicas together. size: tokens. documents: their number.
    labelled: labelled tokens, the loss's denominator. heaviness: the replica's work over the mean of the replicas.
    dropped, carried, skipped, position: see TokenWindow. digest: CRC-32 of all tokens and lengths, of all replicas.
    windows: what it was made of. first_document: of the replica's pack, among theirs.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    plan: ShardingPlan
    planned: Planned
    size: int
    documents: int
    labelled: int
    heaviness: float
    dropped: int
    carried: int
    skipped: int
    position: Position
    digest: int
    windows: Sequence[TokenWindow]
    first_document: int

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on a device."""
        there: dict[str, Any] = {
            name: to_device(getattr(self, name), device) for name in ("tokens", "labels", "position_ids")
        }
        return replace(self, **there)


class Planned(NamedTuple):
    """What a plan's ranks compute and send, as metrics tell it: rows, saving and the bound of the exact exchange's rows
    are means over the model's layers."""

    imbalance: float
    critical_rows: float
    saving: float
    critical_rows_bound: float


def of_plan(plan: ShardingPlan, exchange: str) -> Planned:
    """The numbers of a plan under an exchange."""
    layers = sum(count for _, count in plan.of_kinds)
    return Planned(*plan.over_layers(exchange), plan.certificate.critical_rows / layers)


class Share(NamedTuple):
    """What of a batch this rank computes: the exchange of its plan, its rank in its replica, which replica of how many.

    A replica has an equal number of consecutive windows, one pack for its plan. head_ranks: of each of its holders.
    """

    exchange: str
    rank: int
    replica: int = 0
    replicas: int = 1
    head_ranks: int = 1

    def of(self, windows: Sequence[TokenWindow]) -> TokenWindow:
        """The replica's pack."""
        count = len(windows) // self.replicas
        return join_windows(windows[self.replica * count : (self.replica + 1) * count])

    def first_document(self, windows: Sequence[TokenWindow]) -> int:
        """How many documents the windows of the replicas before this one have."""
        return sum(len(one.document_lengths) for one in windows[: self.replica * (len(windows) // self.replicas)])


def make_batch(windows: Sequence[TokenWindow], share: Share, plan: ShardingPlan) -> Batch:
    """A rank's rows of its replica's share of the windows, under the replica's plan."""
    whole, window = join_windows(windows), share.of(windows)
    every = np.arange(len(whole.document_lengths))
    workload = Workload(read_masks(None, whole.document_lengths), plan.layers)
    work = int(workload.pairs(every, np.zeros_like(every), whole.document_lengths).sum())
    rows = rows_of_rank(plan, share.rank, share.head_ranks)
    return Batch(
        tokens=torch.from_numpy(window.tokens[rows]),
        labels=torch.from_numpy(window.labels[rows]),
        position_ids=torch.from_numpy(positions_of_rank(plan, share.rank, share.head_ranks)),
        plan=plan,
        planned=of_plan(plan, share.exchange),
        size=len(whole.tokens),
        documents=len(whole.document_lengths),
        labelled=whole.labelled,
        heaviness=int(plan.work.sum()) * share.replicas / work,
        dropped=whole.dropped,
        carried=whole.carried,
        skipped=whole.skipped,
        position=whole.position,
        digest=zlib.crc32(whole.document_lengths.data, zlib.crc32(whole.tokens.data)),
        windows=windows,
        first_document=share.first_document(windows),
    )


def _batches(
    packs: Iterable[Sequence[TokenWindow]], make_plan: MakePlan, share: Share, workers: int, ahead: int
) -> Generator[Batch]:
    """The batches; with workers, plans of `ahead` more are under way. An error comes with the batch it concerns."""
    if not workers:
        for windows in packs:
            yield make_batch(windows, share, make_plan(share.of(windows).document_lengths))
        return
    waiting: deque[tuple[Sequence[TokenWindow], Future[ShardingPlan]]] = deque()
    packs, failed = iter(packs), None
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        while True:
            while failed is None and len(waiting) <= ahead:
                try:
                    windows = next(packs)
                except Exception as error:  # StopIteration is one
                    failed = error
                else:
                    waiting.append((windows, pool.submit(make_plan, share.of(windows).document_lengths)))
            if not waiting:
                break
            windows, planned = waiting.popleft()
            yield make_batch(windows, share, planned.result())
    finally:
        pool.shutdown(cancel_futures=True)
    if failed is not None and not isinstance(failed, StopIteration):
        raise failed


class Loader(AbstractContextManager["Loader"]):
    """Batches in order, made in a background thread that stays at most `prefetch` ahead.

    make_plan: document lengths of the replica's pack -> its plan; picklable where there are workers. batch_windows:
    windows of a batch; a last batch with fewer is left out. workers: processes that plan; 0: the thread plans.

    An error is raised at the batch it concerns. Iteration ends after the last batch or `close`.
    Use it as a context manager, or close it: the thread ends with it, and the workers.
    """

    def __init__(
        self,
        windows: Iterable[TokenWindow],
        make_plan: MakePlan,
        share: Share,
        prefetch: int = 4,
        batch_windows: int = 1,
        workers: int = 0,
    ) -> None:
        packs = zip(*[iter(windows)] * batch_windows, strict=False)
        self._batches = batches = _batches(packs, make_plan, share, workers, prefetch)
        self._pool = ThreadPoolExecutor(1, initializer=_name_thread)
        self._make = partial(self._pool.submit, next, batches, None)
        self._ahead = deque(self._make() for _ in range(prefetch + 1))  # one of them in the thread's hand

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self._ahead.popleft().result() if self._ahead else None
        if batch is None:
            self.close()
            raise StopIteration
        self._ahead.append(self._make())
        return batch

    def close(self) -> None:
        """Stop the thread and the workers, and wait for them."""
        self._ahead.clear()
        self._pool.shutdown(cancel_futures=True)
        self._batches.close()

    def __exit__(self, *error: object) -> None:
        self.close()


def _name_thread() -> None:
    threading.current_thread().name = "flashcp-loader"
