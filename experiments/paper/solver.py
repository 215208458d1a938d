"""Table 2: the paper's heuristic, in two readings, beside plans of the exact solver."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from flashcp.experiments.progress import bar
from flashcp.sharding.solver import SolvedPlan, solve_plan
from flashcp.sharding.strategies import plan

__all__ = ["METRICS", "solve_packs"]

METRICS = ("saving", "imbalance", "exact_saving", "bound", "solved")
WORKERS = 2
TOLERANCES = (1.01, 1.05, 1.25)  # the solver's imbalance; a later one where no plan of whole granules has the first


def solve_packs(
    packs: Sequence[np.ndarray], world_size: int, *, granule: int, limit_s: float, label: str = ""
) -> dict[str, dict[str, float]]:
    """Means over packs by provider: `saving` of the paper's compacted exchange, and `imbalance`.

    flashcp_paper moves heads where it equalises tokens, flashcp_paper_tail tails; flashcp's `exact_saving` is of its
    own exchange. exact: the solver's, on documents cut at multiples of `granule`; `bound` is what it could not rule
    out, `solved` the share of packs with no gap left. Raises ImportError without OR-tools.
    """
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for pack in bar(packs, unit="window", desc=label or None):
        plans = {
            "flashcp_paper": plan(pack, world_size, "flashcp_paper"),
            "flashcp_paper_tail": plan(pack, world_size, "flashcp_paper", leaves="tail"),
            "flashcp": plan(pack, world_size),
        }
        for name, made in plans.items():
            found[name].append({"saving": made.route("compacted").saving, "imbalance": made.imbalance})
        found["flashcp"][-1]["exact_saving"] = plans["flashcp"].route("exact").saving
        solved, share = _solve(pack, world_size, granule, limit_s), int(pack.sum()) / world_size
        numbers = {"saving": 1 - solved.rows / share, "bound": 1 - solved.least_rows / share}
        found["exact"].append(numbers | {"imbalance": solved.plan.imbalance, "solved": float(solved.optimal)})
    return {
        name: {metric: float(np.mean([one[metric] for one in each])) for metric in each[0]}
        for name, each in found.items()
    }


def _solve(pack: np.ndarray, world_size: int, granule: int, limit_s: float) -> SolvedPlan:
    settings: dict[str, Any] = {"granule": granule, "exchange": "compacted", "limit_s": limit_s, "workers": WORKERS}
    solve = partial(solve_plan, pack, world_size, **settings)
    for tolerance in TOLERANCES[:-1]:
        with suppress(ValueError):
            return solve(tolerance=tolerance)
    return solve(tolerance=TOLERANCES[-1])
