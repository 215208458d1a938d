"""Figures 3, 5, 6, 7 and Table 2 of the paper: its numbers beside ours, and the picture of both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np

from flashcp.experiments.cli import bar
from flashcp.experiments.paper.numbers import BREAKDOWN, DATA, PAPER, Breakdown, Cell, Numbers, PaperFigure
from flashcp.experiments.plots import TIME_COLOURS, Panel, bars, stacks
from flashcp.sharding.methods import METHODS
from flashcp.sharding.solver import SolvedPlan, solve_plan
from flashcp.sharding.strategies import plan

FLASHCP = "flashcp_paper"
PASSES = {"inference": "forward_ms", "training": "module_ms"}
SPEEDUP = "speedup over llama3"

# --- Figure 3: kernel latency of whole and of cut documents, H = 32, N = 8

DOCUMENTS = {"one 128K document": "1x131072", "sixteen 8K documents": "16x8192"}


def _kernels(numbers: Numbers) -> Panel:
    """Times relative to llama3's."""
    ours, paper = {}, PAPER["kernel_latency"]
    for name, data in DOCUMENTS.items():
        times = {one: numbers(numbers.case(data=data), one, "attention_forward_ms") for one in paper[name]}
        ours[name] = {method: ms / times["llama3"] for method, ms in times.items()}
    return Panel("attention kernels, forward: simulated", ours, paper)


def _cells_3(numbers: Numbers) -> list[Cell]:
    """The four latencies that are not 1 by definition."""
    _, ours, paper = _kernels(numbers)
    pairs = product(DOCUMENTS, ("per_document", "ring_zigzag"))
    return [Cell(f"{name}, {one} over llama3", paper[name][one], ours[name][one]) for name, one in pairs]


def _draw_3(numbers: Numbers, path: Path) -> None:
    bars([[_kernels(numbers)]], path, ylabel="kernel latency over llama3's", size=(7, 4))


# --- Figure 5: average speedups on three data sets, N = 4 and 8, H = 16 and 32, inference and training


def _cells_5(numbers: Numbers) -> list[Cell]:
    """The paper's heuristic over each baseline: means over all settings, inference and training; each alone."""
    found = []
    for method, paper in PAPER["mean_speedups"].items():
        name = f"{FLASHCP} over {method}, mean"
        found.append(Cell(name, paper, _mean(numbers, method, PASSES.values()), allowed=0.15, absolute=True))
        for alone, metric in PASSES.items():
            found.append(Cell(f"{name}, {alone} alone", paper, _mean(numbers, method, [metric]), judged=False))
    return found


def _mean(numbers: Numbers, method: str, metrics: Iterable[str]) -> float:
    ratios = [numbers(c.name, method, m) / numbers(c.name, FLASHCP, m) for c in numbers.cases for m in metrics]
    return float(np.mean(ratios))


def _unhidden(numbers: Numbers) -> dict[str, dict[str, float]]:
    """Rings that hide nothing of what they send, in training. hidden, shown: the heuristic's mean speedup over one as
    simulated, and then. slower: how many times slower than the collectives' its links would have to be for the paper's
    mean, if that of training is the same."""
    found = {}
    for method in ("ring", "ring_zigzag"):
        parts = [
            [numbers(c.name, method, m) for m in ("attention_ms", "copies_ms", "exchange_ms")] for c in numbers.cases
        ]
        ours = [[numbers(c.name, FLASHCP, "module_ms")] for c in numbers.cases]
        attention, copies, sent = np.mean(np.divide(parts, ours), axis=0).tolist()
        found[method] = {
            "hidden": _mean(numbers, method, ["module_ms"]),
            "shown": attention + copies + sent,
            "slower": (PAPER["mean_speedups"][method] - attention - copies) / sent,
        }
    return found


def _draw_5(numbers: Numbers, path: Path) -> None:
    """Six panels as in the paper, whose bars it does not print; ours beyond the paper as the last bars."""
    rows: list[list[Panel]] = [[], []]
    for row, (name, metric) in zip(rows, PASSES.items(), strict=True):
        for data, title in DATA.items():
            groups = {}
            for heads, ranks in product((16, 32), (4, 8)):
                case = numbers.case(data=data, heads=str(heads), ranks=ranks)
                groups[f"H={heads} N={ranks}"] = numbers.speedups(case, metric)
            row.append(Panel(f"{title}, {name}", groups))
    means = ", ".join(f"{c.what.split()[2][:-1]} {c.ours:.2f} ({c.paper:g})" for c in _cells_5(numbers) if c.judged)
    title = f"simulated; mean speedups of {FLASHCP} over each, the paper's in brackets: {means}"
    bars(rows, path, ylabel=SPEEDUP, size=(15, 7.5), title=title)


# --- Figure 6: the parts of one training pass, N = 8, H = 32; the first data set was fitted, see `fit`

FITTED = "wlb_llm"
COLLECTIVES = ("all_gather", "reduce_scatter")
COLOURS = ("#d9a441", TIME_COLOURS["attention"], "#7fa8c4", TIME_COLOURS["exchange"], "#f0b8a8")


def breakdown(numbers: Numbers, data: str, method: str) -> Breakdown:
    """The same parts of ours; what nothing hides of an exchange is halved between its two collectives."""
    case = numbers.case(data=data, ranks=8, heads="32")
    forward, both = (numbers(case, method, f"attention{part}_ms") for part in ("_forward", ""))
    exposed = numbers(case, method, "exposed_exchange_ms") / 2
    return Breakdown(numbers(case, method, "copies_ms"), forward, both - forward, exposed, exposed)


def _cells_6(numbers: Numbers) -> list[Cell]:
    """Ratios between methods of attention and totals, and the collectives' times; single times as context."""
    found = []
    for data, methods in BREAKDOWN.items():
        ours = {method: breakdown(numbers, data, method) for method in methods}
        for method, part in product(methods, (*Breakdown._fields, "total")):
            paper, mine = (getattr(side[method], part) for side in (methods, ours))
            judged = part in COLLECTIVES  # the link's rate was read off those of whole windows
            fitted = judged and (data == FITTED or method != FLASHCP)
            found.append(Cell(f"{data} {method} {part} ms", paper, mine, judged, fitted))
        for part, (one, other) in product(
            ("attention_forward", "attention_backward", "total"), combinations(methods, 2)
        ):
            paper, mine = (getattr(side[one], part) / getattr(side[other], part) for side in (methods, ours))
            found.append(Cell(f"{data} {part} {one}/{other}", paper, mine, fitted=data == FITTED))
    return found


def _methods(numbers: Numbers, data: str) -> list[str]:
    """Those of one window and one head rank, as published and at their best."""
    providers = numbers.providers(numbers.case(data=data, ranks=8, heads="32"))
    return [name for name in providers if name.removesuffix("_best_effort") in METHODS]


def _totals(numbers: Numbers) -> dict[str, Any]:
    """totals: ms of every method by data set. best: of methods at their best over `flashcp`'s."""
    providers = _methods(numbers, "pile")
    totals = {data: {name: breakdown(numbers, data, name).total for name in providers} for data in BREAKDOWN}
    best = {}
    for data, times in totals.items():
        named = ("per_document", "ring_zigzag", "ulysses", FLASHCP)
        best[DATA[data]] = {name: times[f"{name}_best_effort"] / times["flashcp"] for name in named}
    return {"totals": totals, "best": best}


def _draw_6(numbers: Numbers, path: Path) -> None:
    """The paper's stacked bars with ours beside them, and what ours reach beyond them."""
    panels = []
    for data, methods in BREAKDOWN.items():
        columns = {}
        for method, theirs in methods.items():
            columns[f"{method}\npaper"] = theirs
            columns[f"{method}\nours"] = breakdown(numbers, data, method)
        for provider in _methods(numbers, data):
            if provider not in methods and not provider.startswith(("ring", "wlb")):
                columns[provider.replace("_best_effort", "\nbest effort")] = breakdown(numbers, data, provider)
        role = "fitted" if data == FITTED else "the check"
        title = f"{DATA[data]} ({role}): ms of one training pass, N = 8, 128K, H = 32"
        panels.append(Panel(title, {name: parts._asdict() for name, parts in columns.items()}))
    stacks(panels, path, ylabel="ms", colours=dict(zip(Breakdown._fields, COLOURS, strict=True)))


# --- Figure 7: speedup over llama3 by window, WLB-LLM's lengths, N = 8


def _windows(numbers: Numbers) -> dict[str, Panel]:
    found = {}
    for name, paper in PAPER["speedups_by_window"].items():
        cases = {size: numbers.case(context=1024 * int(size.removesuffix("K"))) for size in paper}
        ours = {size: numbers.speedups(case, PASSES[name]) for size, case in cases.items()}
        found[name] = Panel(f"{name}: simulated, by window", ours, paper)
    return found


def _cells_7(numbers: Numbers) -> list[Cell]:
    """Every speedup that the paper prints. That of training at 128K is made of the column of Figure 6."""
    found = []
    for name, (_, ours, paper) in _windows(numbers).items():
        for method, size in product(("per_document", FLASHCP), paper):
            what, fitted = f"{name} {size} {method} over llama3", (name, size) == ("training", "128K")
            found.append(Cell(what, paper[size][method], ours[size][method], fitted=fitted))
    return found


def _turned(numbers: Numbers) -> dict[str, Any]:
    """turned: speedups that are on the other side of 1 than the paper's."""
    return {"turned": [cell.what for cell in _cells_7(numbers) if (cell.paper < 1) != (cell.ours < 1)]}


def _draw_7(numbers: Numbers, path: Path) -> None:
    bars([list(_windows(numbers).values())], path, ylabel=SPEEDUP, size=(14, 4.8))


# --- Table 2: saving and imbalance of the heuristic and of an exact solver, Pile, N = 4

LABELS = {"exact": "solver"}  # in pictures: `exact` is an exchange too
SOLVED = ("saving", "imbalance", "exact_saving", "bound", "solved")
"""Metrics of `solve_packs`."""
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


def _cells_table(numbers: Numbers) -> list[Cell]:
    """The paper's two rows on windows as sampled; what the heuristic reaches of the solver's saving."""
    plain = [case.name for case in numbers.cases if case.weight == 1]
    if not plain:
        raise ValueError("no rows of data.long_document_weight=1")
    found = []
    for method, metric in product((FLASHCP, "exact"), ("saving", "imbalance")):
        found.append(Cell(f"{method} {metric}", PAPER["solver"][method][metric], numbers(plain[0], method, metric)))
    heuristic, _, solver, _ = found
    shares = heuristic.paper / solver.paper, heuristic.ours / solver.ours
    return [*found, Cell("heuristic's saving over the solver's", *shares)]


def _savings(numbers: Numbers) -> dict[str, Any]:
    """weights: savings, bound and share solved by weight of long documents. plain: those of windows as sampled."""
    weights = {}
    for case in numbers.cases:
        solved = {metric: numbers(case.name, "exact", metric) for metric in ("bound", "solved")}
        weights[case.weight] = numbers.of(case.name, "saving") | solved
    return {"weights": weights, "plain": weights[1]}


def _draw_table(numbers: Numbers, path: Path) -> None:
    """Savings by case, the paper's as black lines, and what the solver's bound leaves open."""
    ours = {}
    for case in numbers.cases:
        savings = {LABELS.get(one, one): saving for one, saving in numbers.of(case.name, "saving").items()}
        savings["solver's bound"] = numbers(case.name, "exact", "bound")
        savings["flashcp, exact exchange"] = numbers(case.name, "flashcp", "exact_saving")
        ours[f"Pile, long_document_weight {case.weight:g}"] = savings
    paper = {LABELS.get(name, name): values["saving"] for name, values in PAPER["solver"].items()}
    title = "compacted exchange, N = 4; lines: the paper's heuristic and solver"
    panel = Panel(title, ours, dict.fromkeys(ours, paper))
    bars([[panel]], path, ylabel="saving against the all-gather", size=(10, 4.8))


FIGURES = {
    "paper_fig3": PaperFigure("attention kernels alone, relative to llama3", _draw_3, _cells_3),
    "paper_fig5": PaperFigure("average speedups of FlashCP", _draw_5, _cells_5, _unhidden),
    "paper_fig6": PaperFigure("where the time of one training pass goes", _draw_6, _cells_6, _totals),
    "paper_fig7": PaperFigure(f"{SPEEDUP} by window", _draw_7, _cells_7, _turned),
    "paper_table2": PaperFigure("the heuristic beside an exact solver", _draw_table, _cells_table, _savings),
}
