"""`flashcp plan`: what each method makes of the same packs, without training anything."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import flashcp
from flashcp.experiments.cli.compose import Job, run
from flashcp.experiments.cli.packs import read_packs
from flashcp.experiments.cli.schema import GROUPS
from flashcp.experiments.cli.verbs import AS_JSON
from flashcp.options import naming_options
from flashcp.sharding.methods import METHODS, Method
from flashcp.sharding.plan import ShardingPlan
from flashcp.text import table

__all__ = ["chosen_methods", "heading", "main", "measure", "plannable", "strategy_options"]

CONFIG = "plan"


@dataclass(frozen=True)
class PlannedMethod:
    """One method's numbers over the packs: means, but for `imbalance_max`; ms: median time of one plan, measured."""

    name: str
    sharding: str
    exchange: str
    imbalance: float
    imbalance_max: float
    critical_rows: float
    saving: float
    ms: float


def main(words: Sequence[str]) -> int:
    """Print the table, or one JSON document."""
    return run(show_plans, CONFIG, words)


def show_plans(job: Job) -> None:
    """One job of `flashcp plan`."""
    settings = job.settings
    options = strategy_options(settings)
    methods = chosen_methods(settings)
    packs = read_packs(settings["data"], settings["context"], settings["windows"], settings["seed"])
    world_size = settings["world_size"]
    packs = plannable(packs, world_size)
    with naming_options(options):
        first = flashcp.plan(packs[0], world_size, methods[0].sharding, **options)
    planned = [measure(method, packs, world_size, options) for method in methods]
    if settings["figure"]:
        from flashcp.experiments.cli.picture import draw_methods, draw_plan

        file = Path(settings["figure"])
        if len(methods) == 1:
            file = draw_plan(first, methods[0].exchange, file)
        else:
            each = {m.name: (flashcp.plan(packs[0], world_size, m.sharding), m.exchange) for m in methods}
            file = draw_methods(each, file)
        print(f"wrote {file}", file=sys.stderr)
    if AS_JSON.get():
        print(json.dumps(_document(settings, packs, planned, first if len(methods) == 1 else None), indent=1))
    else:
        print(heading(settings, packs))
        print(_table(planned))
        if len(methods) == 1:
            print(f"\nfirst window\n{first}\n\n{first.certificate}")


def measure(method: Method, packs: Sequence[np.ndarray], world_size: int, options: Mapping[str, Any]) -> PlannedMethod:
    """Plan every pack. options: of the strategy."""
    imbalance, critical, saving, ms = [], [], [], []
    for lengths in packs:
        started = time.perf_counter()
        plan = flashcp.plan(lengths, world_size, method.sharding, **options)
        ms.append(1e3 * (time.perf_counter() - started))
        route = plan.route(method.exchange)
        imbalance.append(route.imbalance)
        critical.append(route.critical_rows)
        saving.append(route.saving)
    return PlannedMethod(
        *method,
        imbalance=float(np.mean(imbalance)),
        imbalance_max=max(imbalance),
        critical_rows=float(np.mean(critical)),
        saving=float(np.mean(saving)),
        ms=float(np.median(ms)),
    )


def chosen_methods(settings: Mapping[str, Any]) -> list[Method]:
    """The one that was named, or all; a pair that nobody published is named after its parts."""
    sharding, exchange = (_name(settings, group) for group in ("sharding", "exchange"))
    if not sharding and not exchange:
        return list(METHODS.values())
    pair = (sharding or "flashcp", exchange or "exact")
    published = METHODS.get(settings["method"])
    if published and published[1:] == pair:
        return [published]
    return [next((method for method in METHODS.values() if method[1:] == pair), Method("+".join(pair), *pair))]


def _name(settings: Mapping[str, Any], group: str) -> str:
    name = (settings[group] or {}).get("name", "")
    if name and name not in GROUPS[group]:
        raise ValueError(f"{group}.name={name!r}: expected one of {', '.join(GROUPS[group])}")
    return str(name)


def strategy_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword options of the strategy that was chosen."""
    return {key: value for key, value in (settings["sharding"] or {}).items() if key != "name"}


def plannable(packs: list[np.ndarray], world_size: int) -> list[np.ndarray]:
    """All packs, without a short last one that has fewer tokens than ranks."""
    if len(packs) > 1 and packs[-1].sum() < min(world_size, packs[0].sum()):
        print(f"left out: a last window of {packs[-1].sum()} tokens, fewer than {world_size} ranks", file=sys.stderr)
        return packs[:-1]
    return packs


def heading(settings: Mapping[str, Any], packs: Sequence[np.ndarray]) -> str:
    """What was planned, in one line."""
    documents = np.mean([len(lengths) for lengths in packs])
    plural = "window" if len(packs) == 1 else "windows"
    shortest = min(int(lengths.sum()) for lengths in packs)
    size = f"{settings['context']}" if shortest == settings["context"] else f"{shortest} to {settings['context']}"
    return (
        f"{len(packs)} {plural} of {size} tokens from {settings['data']['source']}, "
        f"{documents:.1f} documents on average, {settings['world_size']} ranks"
    )


def _table(planned: Sequence[PlannedMethod]) -> str:
    rows = [
        [
            method.name,
            method.sharding,
            method.exchange,
            f"{method.imbalance:.3f}",
            f"{method.imbalance_max:.3f}",
            f"{method.critical_rows:.0f}",
            f"{method.saving:.3f}",
            f"{method.ms:.2f}",
        ]
        for method in planned
    ]
    return table(["method", "sharding", "exchange", "imbalance", "max", "critical rows", "saving", "ms"], rows, text=3)


def _document(
    settings: Mapping[str, Any],
    packs: Sequence[np.ndarray],
    planned: Sequence[PlannedMethod],
    plan: ShardingPlan | None,
) -> dict[str, Any]:
    document = {
        "world_size": settings["world_size"],
        "context": settings["context"],
        "data": settings["data"],
        "seed": settings["seed"],
        "windows": len(packs),
        "documents": sum(len(lengths) for lengths in packs),
        "methods": [vars(method) for method in planned],
    }
    return document if plan is None else {**document, "plan": json.loads(plan.to_json())}
