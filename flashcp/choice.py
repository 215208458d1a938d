"""`flashcp.choose`: head ranks, plan and exchange for a job, by what the simulator predicts; nothing is measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from flashcp.sharding.documents import read_document_lengths
from flashcp.sharding.exchanges import EXCHANGES
from flashcp.sharding.strategies import STRATEGIES
from flashcp.sharding.values import check_choice, holds_items, is_whole, read_list, shown
from flashcp.simulation import read_cluster_or_machine
from flashcp.simulator.cost import ModelShape
from flashcp.simulator.machine import Machine
from flashcp.simulator.pack import Batch, simulate_batch
from flashcp.simulator.planned import Setting
from flashcp.simulator.variants import Step, Variant, make_setting, read_ranks, that_share_heads
from flashcp.text import table

PAIRS = (("flashcp", "exact"), ("flashcp", "all_gather"), ("per_document", "all_gather"), ("per_document", "ring"))
"""Strategies and exchanges that are tried; the first with all head ranks and replicas, the others with its best."""


class Candidate(NamedTuple):
    """A way to run a job. data_parallel: groups of ranks that plan their share of a batch each; 1: one plan for all.
    module_ms: predicted, an attention layer's forward and backward, mean over batches."""

    head_ranks: int
    strategy: str
    exchange: str
    data_parallel: int
    overlap: str
    module_ms: float


@dataclass(frozen=True)
class Choice:
    """The candidate that is predicted to be fastest, and all that were tried, fastest first. `print` shows them.

    batch_windows: windows of a batch.
    """

    candidates: tuple[Candidate, ...]
    cluster: str
    world_size: int
    batch_windows: int

    @property
    def best(self) -> Candidate:
        return self.candidates[0]

    @property
    def head_ranks(self) -> int:
        return self.best.head_ranks

    @property
    def strategy(self) -> str:
        return self.best.strategy

    @property
    def exchange(self) -> str:
        return self.best.exchange

    @property
    def overlap(self) -> str:
        return self.best.overlap

    @property
    def data_parallel(self) -> int:
        return self.best.data_parallel

    @property
    def scope(self) -> str:
        """What a plan is for: `window`, `batch`, or `islands` of some windows each."""
        if self.data_parallel == self.batch_windows:
            return "window"
        return "batch" if self.data_parallel == 1 else "islands"

    def __str__(self) -> str:
        windows = "a window" if self.batch_windows == 1 else f"{self.batch_windows} windows"
        rows = [[*map(str, one[:-1]), f"{one.module_ms:.2f}"] for one in self.candidates]
        head = [name.replace("_", " ") for name in Candidate._fields]
        return (
            f"head_ranks={self.head_ranks} strategy={self.strategy} exchange={self.exchange} overlap={self.overlap}, "
            f"a plan for each {self.scope}: predicted {self.best.module_ms:.2f} ms, {windows} a batch, "
            f"{self.world_size} ranks of {self.cluster}\n{table(head, rows, text=0)}"
        )


def choose(
    batches: Iterable[object],
    world_size: int,
    cluster: str | Machine = "h100-nvlink",
    query_heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    *,
    dtype_bytes: int = 2,
    gradient_wire: str = "auto",
    strategy: str | None = None,
    exchange: str | None = None,
    data_parallel: int | None = None,
    overlap: str = "auto",
) -> Choice:
    """What to run batches like these with, predicted by the simulator.

    batches: document lengths of some batches: of each the lengths in one window, or a list of the lengths in each of
        its windows; every batch has as many windows.
    world_size: ranks of the whole job. cluster: a name of `conf/cluster/`, or a Machine.
    query_heads, kv_heads, head_dim, dtype_bytes: of one attention layer.
    gradient_wire: what KV gradients travel in, as for `flashcp.ContextParallel`.
    strategy, exchange, data_parallel, overlap: what is settled already; None and `auto`: part of the choice. Strategies
        have their default options, and no `cost`.

    `auto` is never `fused`: no GPU has shown yet that it is faster. Raises ValueError naming value, field and what is
    legal.
    """
    ranks, read = read_ranks(world_size), [_read_batch(batch) for batch in _listed(batches, "batches")]
    windows = len(read[0])
    if any(len(batch) != windows for batch in read):
        found = ", ".join(map(str, sorted({len(batch) for batch in read})))
        raise ValueError(f"batches of {found} windows: expected as many in every batch")
    setting = make_setting(
        read_cluster_or_machine(cluster),
        ModelShape(query_heads, kv_heads, head_dim, dtype_bytes),
        overlap,
        gradient_wire,
    )
    step = Step(windows)
    groups = [count for count in range(1, windows + 1) if not (windows % count or ranks % count)]
    if data_parallel is not None:
        if not is_whole(data_parallel) or data_parallel not in groups:
            expected = ", ".join(map(str, groups))
            raise ValueError(f"data_parallel={shown(data_parallel)}: expected one of {expected}, or none")
        groups = [data_parallel]
    pairs = _pairs(strategy, exchange)
    first = [Variant("+".join(pairs[0]), *pairs[0], head_ranks=0, data_parallel=count) for count in groups]
    first, _ = that_share_heads(first, setting, ranks, step)
    tried = _predict(read, ranks, setting, step, [trial for one in first for trial in one.trials(setting, ranks, step)])
    best = first[0]._replace(head_ranks=tried[0].head_ranks, data_parallel=tried[0].data_parallel)
    tried += _predict(
        read, ranks, setting, step, [best._replace(sharding=one, exchange=other) for one, other in pairs[1:]]
    )
    if overlap == "auto":
        tried += _predict(read, ranks, replace(setting, overlap="none"), step, [best])
    ordered = sorted(tried, key=lambda one: one.module_ms)
    return Choice(tuple(ordered), setting.machine.name, ranks, windows)


def _pairs(strategy: str | None, exchange: str | None) -> list[tuple[str, str]]:
    """The strategies and exchanges to try. Raises ValueError for names that there are not."""
    if strategy is not None:
        check_choice("strategy", strategy, STRATEGIES)
    if exchange is not None:
        check_choice("exchange", exchange, EXCHANGES)
    tried = [pair for pair in PAIRS if strategy in (None, pair[0]) and exchange in (None, pair[1])]
    return tried or [(strategy or PAIRS[0][0], exchange or PAIRS[0][1])]


def _predict(
    batches: Sequence[list[np.ndarray]], ranks: int, setting: Setting, step: Step, variants: Sequence[Variant]
) -> list[Candidate]:
    """Fastest first."""
    found = [simulate_batch(Batch(batch, ranks, setting), variants, step) for batch in batches]
    candidates = [
        Candidate(
            one.head_ranks,
            one.sharding,
            one.exchange,
            one.data_parallel,
            setting.overlap,
            float(np.mean([outcomes[one].module_ms for outcomes in found])),
        )
        for one in variants
    ]
    return sorted(candidates, key=lambda one: one.module_ms)


def _read_batch(batch: object) -> list[np.ndarray]:
    """The windows of a batch, one where it holds lengths."""
    listed = _listed(batch, "a batch")
    nested = holds_items(listed[0])
    return [read_document_lengths(window) for window in (listed if nested else [listed])]  # type: ignore[arg-type]


def _listed(values: object, name: str) -> list[object]:
    expected = "document lengths, or windows of them"
    if not (listed := read_list(name, values, expected)):
        raise ValueError(f"{name}={shown(values)}: expected {expected}")
    return listed
