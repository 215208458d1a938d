"""Many packs under many methods, on one process or several."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from flashcp.experiments.progress import bar
from flashcp.experiments.simulator.pack import Outcome, Price, simulate_plans
from flashcp.experiments.simulator.planned import Planned, Setting
from flashcp.experiments.simulator.variants import Variant
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.strategies import plan

__all__ = ["Options", "Outcomes", "make_plans", "simulate_packs"]

PACKS_AT_A_TIME = 16  # handed to a worker together: a pack takes some ten milliseconds
QUIET_S = 2.0  # a run shorter than this shows no bar

Options = Mapping[str, Mapping[str, Any]]
Outcomes = dict[str, Outcome]
"""By method; its numbers are arrays over packs, float64 [packs]."""


def simulate_packs(
    packs: Sequence[np.ndarray],
    variants: Sequence[Variant],
    world_size: int,
    setting: Setting,
    *,
    options: Options | None = None,
    price: Price = Planned,
    workers: int = 1,
    label: str = "",
) -> Outcomes:
    """Every pack's outcome under every method, in order; the same for any number of workers.

    packs: document lengths, int64 [documents] each. options: of strategies, by their name. price: how a plan gets its
    times. label: of the bar on standard error.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: expected a whole number >= 1")
    one = partial(_one, variants=variants, world_size=world_size, setting=setting, options=options or {}, price=price)
    shown = partial(bar, total=len(packs), unit="window", desc=label or None, delay=QUIET_S)
    if workers == 1:
        rows = list(shown(map(one, packs)))
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            rows = list(shown(pool.map(one, packs, chunksize=PACKS_AT_A_TIME)))
    return {variant.name: Outcome(*np.array([row[place] for row in rows]).T) for place, variant in enumerate(variants)}


def make_plans(
    pack: np.ndarray, variants: Iterable[Variant], world_size: int, options: Options
) -> dict[str, ShardingPlan]:
    """A pack's plan by each strategy that the methods have."""
    names = dict.fromkeys(variant.sharding for variant in variants)
    return {name: plan(pack, world_size, name, **options.get(name, {})) for name in names}


def _one(
    pack: np.ndarray, variants: Sequence[Variant], world_size: int, setting: Setting, options: Options, price: Price
) -> list[Outcome]:
    outcomes = simulate_plans(make_plans(pack, variants, world_size, options), variants, setting, price)
    return [outcomes[variant.name] for variant in variants]
