"""One pack under many methods: plans and their prices are shared between methods of the same strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.strategies import plan
from flashcp.simulator.best_effort import best_effort
from flashcp.simulator.ours import ours
from flashcp.simulator.planned import Module, Planned, Setting
from flashcp.simulator.published import published
from flashcp.simulator.variants import GIVEN_PLAN, Variant

Pack = np.ndarray | ShardingPlan
Options = Mapping[str, Mapping[str, Any]]
Price = Callable[[ShardingPlan, Setting], Planned]
RUN = {"published": published, "best effort": best_effort, "ours": ours}


class Outcome(NamedTuple):
    """One pack's numbers under one method.

    module_ms: until the last rank is through, forward and backward. attention_ms, copies_ms: of the rank with most of
    both; exposed_exchange_ms: the rest of the module, when rows travel that nothing hides. exchange_ms: of the exchange
    with nothing beside it. forward_ms: the module's forward alone. attention_forward_ms: of attention_ms.
    kept_mib, working_mib: buffers for others' KV (see `Module`).
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


def make_plans(pack: Pack, variants: Sequence[Variant], world_size: int, options: Options) -> dict[str, ShardingPlan]:
    """A pack's plan by each strategy that the methods have; a plan that was given is that of `GIVEN_PLAN`."""
    given = {GIVEN_PLAN: pack} if isinstance(pack, ShardingPlan) else {}
    lengths = pack.document_lengths if isinstance(pack, ShardingPlan) else pack
    names = dict.fromkeys(variant.sharding for variant in variants if variant.sharding not in given)
    return {**given, **{name: plan(lengths, world_size, name, **options.get(name, {})) for name in names}}


def simulate_plans(
    plans: Mapping[str, ShardingPlan], variants: Sequence[Variant], setting: Setting, price: Price = Planned
) -> dict[str, Outcome]:
    """The outcome of each method by name. plans: by strategy, for at least the methods' ones. price: how a plan gets
    its times."""
    names = dict.fromkeys(variant.sharding for variant in variants)
    planned = {name: price(plans[name], setting) for name in names}
    return {variant.name: _outcome(planned[variant.sharding], variant) for variant in variants}


def simulate_module(planned: Planned, variant: Variant) -> Module:
    """The timelines of a method."""
    return RUN[variant.implementation](planned, variant.exchange)


def _outcome(planned: Planned, variant: Variant) -> Outcome:
    route, module = planned.plan.route(variant.exchange), simulate_module(planned, variant)
    passes = module.forward, module.backward
    ends = [float(timeline.now.max()) for timeline in passes]
    attention, copies = (
        [float(timeline.busy[kind][timeline.busiest]) for timeline in passes] for kind in ("attention", "copies")
    )
    return Outcome(
        imbalance=float(route.imbalance),
        critical_rows=float(route.critical_rows),
        saving=float(route.saving),
        attention_ms=sum(attention) / 1e3,
        attention_forward_ms=attention[0] / 1e3,
        exchange_ms=module.exchange_us / 1e3,
        exposed_exchange_ms=(sum(ends) - sum(attention) - sum(copies)) / 1e3,
        copies_ms=sum(copies) / 1e3,
        module_ms=sum(ends) / 1e3,
        forward_ms=ends[0] / 1e3,
        kept_mib=module.kept_bytes / 2**20,
        working_mib=module.working_bytes / 2**20,
    )
