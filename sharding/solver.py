"""The best plan there is at a given granularity, by CP-SAT: the oracle of the tests and the paper's ILP column.

Needs OR-tools (`pip install flashcp[exact]`). Seconds to hours: for small packs, or large ones in coarse granules.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from flashcp.sharding.documents import expand_ranges, read_document_lengths, read_world_size
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.shards import ShardTable, shard_work


@dataclass(frozen=True)
class SolvedPlan:
    """What the solver found: a plan, the rows it minimised, and a proven bound on them at this granularity."""

    plan: ShardingPlan
    rows: int
    least_rows: int

    @property
    def optimal(self) -> bool:
        """Whether no plan of the same granularity, token slack and tolerance has fewer rows."""
        return self.rows == self.least_rows


def solve_plan(
    document_lengths: Iterable[int],
    world_size: int,
    *,
    granule: int,
    tolerance: float = 1.01,
    exchange: str = "exact",
    limit_s: float = 20.0,
    workers: int = 1,
    hint: ShardingPlan | None = None,
) -> SolvedPlan:
    """Fewest critical rows of `exact` (or largest non-last rows of a rank, what `compacted` pads to).

    Documents are cut at multiples of `granule` only. Ranks hold equal tokens if granules allow it (all lengths are
    multiples, and N divides their number), else tokens that differ from the mean by less than a granule.
    limit_s: solver seconds, after which the best plan so far is returned. hint: where to start.
    Raises ImportError without OR-tools; ValueError for a bad option, or if no plan within the tolerance was found.
    """
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise ImportError("solve_plan needs OR-tools: pip install flashcp[exact]") from error
    lengths = read_document_lengths(document_lengths)
    tokens = int(lengths.sum())
    ranks = range(read_world_size(world_size))
    if granule < 1:
        raise ValueError(f"granule={granule}: expected a whole number >= 1")
    if exchange not in ("exact", "compacted"):
        raise ValueError(f"exchange={exchange!r}: expected exact or compacted")
    count = -(-lengths // granule)
    document, start = np.repeat(np.arange(len(lengths)), count), expand_ranges(0 * count, count) * granule
    stop = np.minimum(start + granule, lengths[document])  # a document's last one may be short
    pieces = range(len(document))
    rows = (stop - start).tolist()
    work = shard_work(start, stop).tolist()
    last = np.append(document[1:] != document[:-1], True)

    model = cp_model.CpModel()
    held = [[model.new_bool_var(f"held_{i}_{r}") for r in ranks] for i in pieces]
    for i in pieces:
        model.add_exactly_one(held[i])
    even = (lengths % granule == 0).all() and tokens % (world_size * granule) == 0
    slack = 0 if even else granule - 1
    for r in ranks:
        share = sum(rows[i] * held[i][r] for i in pieces)
        model.add_linear_constraint(share, -(-tokens // world_size) - slack, tokens // world_size + slack)
        model.add(sum(work[i] * held[i][r] for i in pieces) <= int(tolerance * sum(work) / world_size))
    model.add(held[0][0] == 1)  # ranks are alike

    critical = model.new_int_var(0, tokens * world_size, "critical")
    if exchange == "exact":
        reads = [[model.new_bool_var(f"reads_{i}_{r}") for r in ranks] for i in pieces]  # or holds
        copies = [[model.new_int_var(0, world_size - 1, f"copies_{i}_{r}") for r in ranks] for i in pieces]
        for i in pieces:
            for r in ranks:
                model.add_implication(held[i][r], reads[i][r])
                if not last[i]:
                    model.add_implication(reads[i + 1][r], reads[i][r])
                model.add(copies[i][r] >= sum(reads[i]) - 1).only_enforce_if(held[i][r])
        for r in ranks:
            model.add(critical >= sum(rows[i] * (reads[i][r] - held[i][r]) for i in pieces))
            model.add(critical >= sum(rows[i] * copies[i][r] for i in pieces))
    else:
        closing = [[model.new_bool_var(f"closing_{i}_{r}") for r in ranks] for i in pieces]  # in the last shard
        for i in pieces:
            for r in ranks:
                model.add_implication(closing[i][r], held[i][r])
                if not last[i]:
                    model.add_implication(closing[i][r], closing[i + 1][r])
        for r in ranks:
            model.add(critical >= sum(rows[i] * (held[i][r] - closing[i][r]) for i in pieces))
    model.minimize(critical)
    if hint is not None:
        owner = _owners(hint, document, start)
        for i in pieces:
            for r in ranks:
                model.add_hint(held[i][r], int(owner[i] == r))

    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = limit_s
    solver.parameters.num_workers = workers
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise ValueError(
            f"granule={granule}, tolerance={tolerance}: no plan found in {limit_s} s ({solver.status_name(status)})"
        )
    rank = np.array([next(r for r in ranks if solver.value(held[i][r])) for i in pieces], dtype=np.int64)
    plan = ShardingPlan(lengths, world_size, ShardTable(document, start, stop, rank), "exact")
    return SolvedPlan(plan, round(solver.objective_value), int(np.ceil(solver.best_objective_bound - 1e-6)))


def _owners(plan: ShardingPlan, document: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The rank that holds the first row of each granule, renamed so that granule 0 lies on rank 0."""
    first = plan.offsets[plan.table.document] + plan.table.start
    at = np.searchsorted(first, plan.offsets[document] + start, side="right") - 1
    owner = plan.table.rank[at]
    return (owner - owner[0]) % plan.world_size
