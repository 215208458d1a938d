"""Many packs under many methods, on one process or several."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.strategies import plan
from flashcp.simulator.pack import Outcome, Price, simulate_plans
from flashcp.simulator.planned import Planned, Setting
from flashcp.simulator.variants import GIVEN_PLAN, Variant

__all__ = ["Options", "Outcomes", "Pack", "Watch", "make_plans", "simulate_packs"]

PACKS_AT_A_TIME = 16  # handed to a worker together: a pack takes some ten milliseconds

Pack = np.ndarray | ShardingPlan
Options = Mapping[str, Mapping[str, Any]]
Watch = Callable[[Iterable[Any]], Iterable[Any]]
Outcomes = dict[str, Outcome]
"""By method; its numbers are arrays over packs, float64 [packs]."""


def simulate_packs(
    packs: Sequence[Pack],
    variants: Sequence[Variant],
    world_size: int,
    setting: Setting,
    *,
    options: Options | None = None,
    price: Price = Planned,
    workers: int = 1,
    watch: Watch = iter,
) -> Outcomes:
    """Every pack's outcome under every method, in order; the same for any number of workers.

    packs: document lengths, int64 [documents] each, or plans of `world_size` ranks.
    options: of strategies, by their name. price: how a plan gets its times.
    watch: hands on the packs' numbers one by one, as a progress bar does.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: expected a whole number >= 1")
    one = partial(_one, variants=variants, world_size=world_size, setting=setting, options=options or {}, price=price)
    if workers == 1:
        rows = list(watch(map(one, packs)))
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            rows = list(watch(pool.map(one, packs, chunksize=PACKS_AT_A_TIME)))
    return {variant.name: Outcome(*np.array([row[place] for row in rows]).T) for place, variant in enumerate(variants)}


def make_plans(pack: Pack, variants: Sequence[Variant], world_size: int, options: Options) -> dict[str, ShardingPlan]:
    """A pack's plan by each strategy that the methods have; a plan that was given is that of `GIVEN_PLAN`."""
    names = dict.fromkeys(variant.sharding for variant in variants)
    if not isinstance(pack, ShardingPlan):
        return {name: plan(pack, world_size, name, **options.get(name, {})) for name in names}
    others = [variant for variant in variants if variant.sharding != GIVEN_PLAN]
    return {GIVEN_PLAN: pack, **make_plans(pack.document_lengths, others, world_size, options)}


def _one(
    pack: Pack, variants: Sequence[Variant], world_size: int, setting: Setting, options: Options, price: Price
) -> list[Outcome]:
    outcomes = simulate_plans(make_plans(pack, variants, world_size, options), variants, setting, price)
    return [outcomes[variant.name] for variant in variants]
