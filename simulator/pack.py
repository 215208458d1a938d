"""One step under many methods: its windows are placed, planned and priced; methods share plans and prices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from flashcp.sharding.holders import rows_between_and_inside
from flashcp.sharding.mask import LayerKind
from flashcp.sharding.masks import Workload, read_masks
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.strategies import plan_workload
from flashcp.simulator.module import PredictedTime, simulate_module
from flashcp.simulator.planned import Planned, Setting
from flashcp.simulator.rivals import RIVALS
from flashcp.simulator.variants import GIVEN_PLAN, WINDOW, Step, Variant

Pack = np.ndarray | ShardingPlan
Options = Mapping[str, Mapping[str, Any]]
Price = Callable[[ShardingPlan, Setting], Planned]
Made = tuple[tuple[int, ...], str, int, Variant | None]
"""What a plan is made of: windows, strategy, holders, and whose time chooses."""


class Outcome(NamedTuple):
    """One batch's numbers under one method.

    module_ms: until the last rank of the job is through, forward and backward. attention_ms, copies_ms: of the rank
    with most of both, in the slowest replica; exposed_exchange_ms: the rest of the module, when rows travel that
    nothing hides, or are awaited from a rank that still attends. exchange_ms: of the exchange with nothing beside it,
    or what is exposed of it where such waiting is longer. forward_ms: the module's forward alone.
    attention_forward_ms: of attention_ms. kept_mib, working_mib: buffers for others' KV (see `Module`).
    tokens_imbalance: most tokens of a rank over the mean. critical_rows, saving: all-to-alls counted, as KV rows of the
    same bytes where query and KV heads are equally many.
    """

    imbalance: float
    critical_rows: float
    saving: float
    attention_ms: float
    attention_forward_ms: float
    exchange_ms: float
    exposed_exchange_ms: float
    copies_ms: float
    module_ms: float
    forward_ms: float
    kept_mib: float
    working_mib: float
    tokens_imbalance: float


class Batch:
    """The windows of one step; plans and prices are made once for all methods that share them.

    options: of strategies, by their name. price: how a plan gets its times.
    """

    def __init__(
        self,
        packs: Sequence[Pack],
        ranks: int,
        setting: Setting,
        options: Options | None = None,
        price: Price = Planned,
    ) -> None:
        self.packs, self.ranks = packs, ranks
        self._setting, self._options, self._price = setting, options or {}, price
        self._plan, self._priced = cache(self._make_plan), cache(self._make_price)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of layers of the model."""
        return self._setting.layers or (LayerKind(0, 0, 1),)

    def plan(self, variant: Variant, windows: tuple[int, ...] = (0,), replicas: int = 1) -> ShardingPlan:
        """Of these windows behind one another, for the ranks of one of so many replicas."""
        return self._plan(windows, variant.sharding, self.ranks // replicas // variant.head_ranks, self._timed(variant))

    def planned(
        self, variant: Variant, windows: tuple[int, ...] = (0,), replicas: int = 1, kind: LayerKind | None = None
    ) -> Planned:
        """That plan with its prices in a layer of one kind; None: the first."""
        holders, wire = self.ranks // replicas // variant.head_ranks, variant.wire(self._setting.gradient_wire)
        made = windows, variant.sharding, holders, self._timed(variant)
        return self._priced(made, variant.head_ranks, wire, (kind or self.kinds[0])[:2])

    def _make_price(self, made: Made, head_ranks: int, wire: str, limits: tuple[int, int]) -> Planned:
        own = replace(self._setting, head_ranks=head_ranks, gradient_wire=wire)
        window, chunk = (limit or None for limit in limits)
        return self._price(self._plan(*made).narrow(window, chunk), own)

    def _timed(self, variant: Variant) -> Variant | None:
        """Whose predicted time the planner chooses by; None: it looks at rows and balance alone."""
        return variant._replace(name="", data_parallel=1, dealt=False) if variant.timed else None

    def _make_plan(self, windows: tuple[int, ...], sharding: str, holders: int, timed: Variant | None) -> ShardingPlan:
        (first, *others) = (self.packs[window] for window in windows)
        if isinstance(first, ShardingPlan):
            if sharding == GIVEN_PLAN and first.world_size == holders:
                return first
            first, sharding = first.document_lengths, "contiguous" if sharding == GIVEN_PLAN else sharding
        lengths = np.concatenate([first, *others]) if others else first
        workload = self.workload(lengths)
        if sharding in RIVALS:
            return RIVALS[sharding](lengths, holders, workload)
        options = dict(self._options.get(sharding, {}))
        if timed:
            options["cost"] = PredictedTime(self._setting, timed)
        return plan_workload(workload, holders, sharding, **options)

    def workload(self, pack: Pack) -> Workload:
        """What is computed on a pack."""
        if isinstance(pack, ShardingPlan):
            return pack.workload
        return Workload(read_masks(self._setting.mask, pack), self._setting.layers)


def simulate_batch(batch: Batch, variants: Iterable[Variant], step: Step = WINDOW) -> dict[Variant, Outcome]:
    """The outcome of each method on the windows of one step."""
    work, found = np.array([_work(batch.workload(pack)) for pack in batch.packs]), {}
    for variant in variants:
        placed = place(work, variant, step)
        outcomes = [
            [_of_mix(batch, variant, tuple(map(int, own)), len(replicas)) for own in replicas] for replicas in placed
        ]
        found[variant] = _slowest(outcomes, work[placed].sum(axis=2), step.waits)
    return found


def place(work: np.ndarray, variant: Variant, step: Step) -> np.ndarray:
    """Which windows each replica has in each micro-batch, [micro-batches, replicas, windows].

    Windows are dealt as they come, or by their work [windows]: where every micro-batch waits, those alike go together;
    where only the step does, heaviest first to the replica with least.
    """
    shape = step.micro_batches, variant.data_parallel or step.batch_windows, -1
    heaviest = np.argsort(-work, kind="stable")
    if not variant.dealt:
        return np.arange(len(work)).reshape(shape)
    if step.waits == "micro_batch":
        return heaviest.reshape(shape)
    has: list[list[int]] = [[] for _ in range(step.batch_windows)]
    for window in heaviest.tolist():
        min((one for one in has if len(one) < step.micro_batches), key=lambda one: work[one].sum()).append(window)
    return np.array(has).T[:, :, None]


def _work(workload: Workload) -> float:
    lengths = workload.masks.length
    return float(workload.pairs(np.arange(len(lengths)), np.zeros_like(lengths), lengths).sum())


def _slowest(outcomes: Sequence[Sequence[Outcome]], work: np.ndarray, waits: str) -> Outcome:
    """Of [micro-batches][replicas] outcomes, those of the replica that everybody waits for; means over micro-batches.

    work: of each [micro-batches, replicas]. Balance, rows and buffers are those of all ranks.
    """
    if work.size == 1:
        return outcomes[0][0]
    every = Outcome(*np.moveaxis(np.array(outcomes), 2, 0))
    slow = np.argmax(every.module_ms, axis=1)
    if waits == "step":
        slow[:] = np.argmax(np.sum(every.module_ms, axis=0))
    shown = Outcome(*(float(np.mean(column[np.arange(len(slow)), slow])) for column in np.array(every)))
    return shown._replace(
        imbalance=float(np.mean((every.imbalance * work).max(axis=1) / work.mean(axis=1))),
        critical_rows=float(np.mean(np.max(every.critical_rows, axis=1))),
        saving=float(np.mean(np.min(every.saving, axis=1))),
        kept_mib=float(np.max(every.kept_mib)),
        working_mib=float(np.max(every.working_mib)),
    )


def _of_mix(batch: Batch, variant: Variant, windows: tuple[int, ...], replicas: int) -> Outcome:
    """The mean over the model's layers; buffers for one layer's pass are those of the kind that needs most."""
    outcomes = [_outcome(batch.planned(variant, windows, replicas, kind), variant) for kind in batch.kinds]
    if len(outcomes) == 1:
        return outcomes[0]
    mean = Outcome(*np.average(np.array(outcomes), axis=0, weights=[kind.layers for kind in batch.kinds]).tolist())
    return mean._replace(
        imbalance=batch.plan(variant, windows, replicas).imbalance,
        working_mib=max(outcome.working_mib for outcome in outcomes),
    )


def _outcome(planned: Planned, variant: Variant) -> Outcome:
    module = simulate_module(planned, variant)
    passes = module.forward, module.backward
    ends = [float(timeline.now.max()) for timeline in passes]
    attention, copies = (
        [float(timeline.busy[kind][timeline.busiest]) for timeline in passes] for kind in ("attention", "copies")
    )
    route = planned.plan.route("exact" if variant.exchange == "ulysses" else variant.exchange)  # one holder: no rows
    share = planned.shape.kv_heads / planned.setting.shape.kv_heads
    critical, saving = rows_between_and_inside(route, planned.setting.head_ranks, share)
    tokens = planned.plan.tokens
    exposed_us = sum(ends) - sum(attention) - sum(copies)
    return Outcome(
        imbalance=float(planned.plan.imbalance),
        critical_rows=float(critical),
        saving=float(saving),
        attention_ms=sum(attention) / 1e3,
        attention_forward_ms=attention[0] / 1e3,
        exchange_ms=max(module.exchange_us, exposed_us) / 1e3,
        exposed_exchange_ms=exposed_us / 1e3,
        copies_ms=sum(copies) / 1e3,
        module_ms=sum(ends) / 1e3,
        forward_ms=ends[0] / 1e3,
        kept_mib=module.kept_bytes / 2**20,
        working_mib=module.working_bytes / 2**20,
        tokens_imbalance=float(tokens.max() * len(tokens) / tokens.sum()),
    )
