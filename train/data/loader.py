"""Packs to batches: plans are made and rows picked in a background thread, ahead of the step."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from flashcp.kernels.uploads import to_device
from flashcp.sharding.holders import positions_of_rank, rows_of_rank
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.route import Route
from flashcp.train.data.documents import Position
from flashcp.train.data.windows import TokenWindow


@dataclass(frozen=True)
class Batch:
    """One pack as one rank sees it.

    tokens, labels, position_ids: this rank's rows in the plan's local order, of its holder's its share, int64 [rank's
    tokens]; positions count from 0 in each document of the pack. plan, route: the whole pack's.
    labelled: labelled tokens of the pack over all ranks, the loss's denominator.
    dropped, carried, position: see TokenWindow.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    plan: ShardingPlan
    route: Route
    labelled: int
    dropped: int
    carried: int
    position: Position

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on a device."""
        there: dict[str, Any] = {
            name: to_device(getattr(self, name), device) for name in ("tokens", "labels", "position_ids")
        }
        return replace(self, **there)


def make_batch(window: TokenWindow, plan: ShardingPlan, exchange: str, rank: int, head_ranks: int = 1) -> Batch:
    """A rank's rows of a pack under a plan."""
    rows = rows_of_rank(plan, rank, head_ranks)
    _ = plan.certificate  # made here, ahead of the step, for the metrics
    return Batch(
        tokens=torch.from_numpy(window.tokens[rows]),
        labels=torch.from_numpy(window.labels[rows]),
        position_ids=torch.from_numpy(positions_of_rank(plan, rank, head_ranks)),
        plan=plan,
        route=plan.route(exchange),
        labelled=window.labelled,
        dropped=window.dropped,
        carried=window.carried,
        position=window.position,
    )


class Loader(AbstractContextManager["Loader"]):
    """Batches in order, made in a background thread that stays at most `prefetch` ahead.

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
        head_ranks: int = 1,
    ) -> None:
        batches = (
            make_batch(window, make_plan(window.document_lengths), exchange, rank, head_ranks) for window in windows
        )
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
