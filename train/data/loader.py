"""Packs to batches: plans are made and rows picked in a background thread, ahead of the step."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from flashcp.kernels.uploads import to_device
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.route import Route
from flashcp.sharding.shards import shard_work
from flashcp.train.data.documents import Position
from flashcp.train.data.windows import TokenWindow, join_windows


@dataclass(frozen=True)
class Batch:
    """Some windows, one pack for each replica, as one rank sees them.

    tokens, labels, position_ids: this rank's rows in the plan's local order, int64 [rank's tokens]; positions
    count from 0 in each document of the pack. plan, route: of the replica's whole pack.
    The others are of all replicas together. size: tokens. documents: their number.
    labelled: labelled tokens, the loss's denominator. heaviness: the replica's work over the mean of the replicas.
    dropped, carried, position: see TokenWindow.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    plan: ShardingPlan
    route: Route
    size: int
    documents: int
    labelled: int
    heaviness: float
    dropped: int
    carried: int
    position: Position

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on a device."""
        there: dict[str, Any] = {
            name: to_device(getattr(self, name), device) for name in ("tokens", "labels", "position_ids")
        }
        return replace(self, **there)


def make_batch(
    windows: Sequence[TokenWindow],
    make_plan: Callable[[np.ndarray], ShardingPlan],
    exchange: str,
    rank: int,
    replica: int = 0,
    replicas: int = 1,
) -> Batch:
    """A rank's rows of its replica's share of the windows, which are one pack for the plan."""
    share = len(windows) // replicas
    whole = join_windows(windows)
    window = join_windows(windows[replica * share : (replica + 1) * share])
    plan = make_plan(window.document_lengths)
    work = int(shard_work(0, whole.document_lengths).sum())
    rows = plan.rows(rank)
    _ = plan.certificate  # made here, ahead of the step, for the metrics
    return Batch(
        tokens=torch.from_numpy(window.tokens[rows]),
        labels=torch.from_numpy(window.labels[rows]),
        position_ids=torch.from_numpy(plan.positions(rank)),
        plan=plan,
        route=plan.route(exchange),
        size=len(whole.tokens),
        documents=len(whole.document_lengths),
        labelled=whole.labelled,
        heaviness=int(plan.work.sum()) * replicas / work,
        dropped=whole.dropped,
        carried=whole.carried,
        position=whole.position,
    )


class Loader(AbstractContextManager["Loader"]):
    """Batches in order, made in a background thread that stays at most `prefetch` ahead.

    batch_windows: windows of a batch; a last batch with fewer is left out. replica, replicas: whose share is planned.
    An error in the thread is raised at the batch it concerns. Iteration ends after the last batch or `close`.
    Use it as a context manager, or close it: the thread ends with it.
    """

    def __init__(
        self,
        windows: Iterable[TokenWindow],
        make_plan: Callable[[np.ndarray], ShardingPlan],
        exchange: str,
        rank: int,
        prefetch: int = 4,
        *,
        batch_windows: int = 1,
        replica: int = 0,
        replicas: int = 1,
    ) -> None:
        packs = zip(*[iter(windows)] * batch_windows, strict=False)
        batches = (make_batch(pack, make_plan, exchange, rank, replica, replicas) for pack in packs)
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
        """Stop the thread and wait for it."""
        self._ahead.clear()
        self._pool.shutdown(cancel_futures=True)

    def __exit__(self, *error: object) -> None:
        self.close()


def _name_thread() -> None:
    threading.current_thread().name = "flashcp-loader"
