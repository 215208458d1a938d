"""Figures 3, 5, 6, 7 and Table 2 of the paper: its numbers beside ours, and the picture of both."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flashcp.experiments.paper.numbers import Cell, Numbers
from flashcp.experiments.paper.values import (
    BREAKDOWN,
    KERNEL_LATENCY,
    MEAN_SPEEDUPS,
    SOLVER,
    SPEEDUPS_BY_CONTEXT,
    Breakdown,
)
from flashcp.experiments.plots import PARTS, Panel, bars, stacks

__all__ = ["UnhiddenRing", "breakdown", "plain_case", "unhidden_ring"]

FLASHCP = "flashcp_paper"
PASSES = {"inference": "forward_ms", "training": "module_ms"}
DATA = {"wlb_llm": "WLB-LLM", "pile": "Pile", "redpajama": "RedPajama"}

# --- Figure 3: kernel latency of whole and of cut documents, H = 32, N = 8

DOCUMENTS = {"one 128K document": "1x131072", "sixteen 8K documents": "16x8192"}


def _latency(numbers: Numbers) -> dict[str, dict[str, float]]:
    found = {}
    for name, data in DOCUMENTS.items():
        case = numbers.case(data=data)
        base = numbers(case, "llama3", "attention_forward_ms")
        found[name] = {method: numbers(case, method, "attention_forward_ms") / base for method in KERNEL_LATENCY[name]}
    return found


def fig3_cells(numbers: Numbers) -> list[Cell]:
    """The four latencies that are not 1 by definition."""
    ours = _latency(numbers)
    return [
        Cell(f"{name}, {method} over llama3", paper, ours[name][method])
        for name, methods in KERNEL_LATENCY.items()
        for method, paper in methods.items()
        if method != "llama3"
    ]


def fig3_draw(numbers: Numbers, path: Path) -> None:
    """Two groups of three bars."""
    panel = Panel("attention kernels, forward: simulated", _latency(numbers), KERNEL_LATENCY)
    bars([[panel]], path, ylabel="kernel latency over llama3's", size=(7, 4))


# --- Figure 5: average speedups on three data sets, N = 4 and 8, H = 16 and 32, inference and training

ALLOWED = 0.15  # of an average speedup, in its own unit


def fig5_cells(numbers: Numbers) -> list[Cell]:
    """The paper's heuristic over each baseline: means over all settings, inference and training; each alone."""
    found = []
    for method, paper in MEAN_SPEEDUPS.items():
        means = {name: _mean(numbers, method, [metric]) for name, metric in PASSES.items()}
        both = Cell(f"{FLASHCP} over {method}, mean", paper, _mean(numbers, method, PASSES.values()))
        found.append(both._replace(allowed=ALLOWED, absolute=True))
        found += [Cell(f"{both.what}, {name} alone", paper, mean, judged=False) for name, mean in means.items()]
    return found


def _mean(numbers: Numbers, method: str, metrics: Iterable[str]) -> float:
    ratios = [numbers(case, method, m) / numbers(case, FLASHCP, m) for case in numbers.names for m in metrics]
    return float(np.mean(ratios))


class UnhiddenRing(NamedTuple):
    """A ring that hides nothing of what it sends, in training. hidden, shown: the heuristic's mean speedup over it as
    simulated, and then. slower: how many times slower than the collectives' its links would have to be for the paper's
    mean, if that of training is the same."""

    hidden: float
    shown: float
    slower: float


def unhidden_ring(numbers: Numbers, method: str) -> UnhiddenRing:
    """What a ring's rows say of it."""
    shares = []
    for case in numbers.names:
        ours = numbers(case, FLASHCP, "module_ms")
        busy = numbers(case, method, "attention_ms") + numbers(case, method, "copies_ms")
        shares.append((busy / ours, numbers(case, method, "exchange_ms") / ours))
    busy_share, exchange_share = np.mean(shares, axis=0).tolist()
    slower = (MEAN_SPEEDUPS[method] - busy_share) / exchange_share
    return UnhiddenRing(_mean(numbers, method, ["module_ms"]), busy_share + exchange_share, slower)


def fig5_facts(numbers: Numbers) -> dict[str, Any]:
    """Both rings with nothing hidden."""
    return {method: unhidden_ring(numbers, method) for method in ("ring", "ring_zigzag")}


def fig5_draw(numbers: Numbers, path: Path) -> None:
    """Six panels as in the paper, whose bars it does not print; ours beyond the paper as the last bars."""
    groups = {
        data: {
            f"H={heads} N={ranks}": numbers.case(data=data, heads=str(heads), ranks=ranks)
            for heads in (16, 32)
            for ranks in (4, 8)
        }
        for data in DATA
    }
    rows = [
        [
            Panel(f"{DATA[data]}, {name}", {group: _speedups(numbers, case, metric) for group, case in cases.items()})
            for data, cases in groups.items()
        ]
        for name, metric in PASSES.items()
    ]
    means = ", ".join(f"{c.what.split()[2][:-1]} {c.ours:.2f} ({c.paper:g})" for c in fig5_cells(numbers) if c.judged)
    title = f"simulated; mean speedups of {FLASHCP} over each, the paper's in brackets: {means}"
    bars(rows, path, ylabel="speedup over llama3", size=(15, 7.5), title=title)


def _speedups(numbers: Numbers, case: str, metric: str) -> dict[str, float]:
    base = numbers(case, "llama3", metric)
    return {provider: base / numbers(case, provider, metric) for provider in numbers.providers(case)}


# --- Figure 6: the parts of one training pass, N = 8, H = 32; the first data set was fitted, see `fit`

FITTED = "wlb_llm"
STACK = dict(
    zip(Breakdown._fields, ("#d9a441", PARTS["attention"], "#7fa8c4", PARTS["exchange"], "#f0b8a8"), strict=True)
)


def breakdown(numbers: Numbers, data: str, method: str) -> Breakdown:
    """The same parts of ours; what nothing hides of an exchange is halved between its two collectives."""
    case = numbers.case(data=data, ranks=8, heads="32")
    forward, both = (numbers(case, method, f"attention{part}_ms") for part in ("_forward", ""))
    exposed = numbers(case, method, "exposed_exchange_ms") / 2
    return Breakdown(numbers(case, method, "copies_ms"), forward, both - forward, exposed, exposed)


def fig6_cells(numbers: Numbers) -> list[Cell]:
    """Ratios between methods of attention and totals, and the collectives' times; single times as context."""
    found = []
    for data, methods in BREAKDOWN.items():
        column = data == FITTED
        ours = {method: breakdown(numbers, data, method) for method in methods}
        for method, theirs in methods.items():
            for part in (*Breakdown._fields, "total"):
                cell = Cell(f"{data} {method} {part} ms", getattr(theirs, part), getattr(ours[method], part))
                # The link's rate was read off the collectives of whole windows.
                collective, fitted = part in ("all_gather", "reduce_scatter"), column or method != FLASHCP
                found.append(cell._replace(judged=collective, fitted=collective and fitted))
        for part in ("attention_forward", "attention_backward", "total"):
            for one, other in combinations(methods, 2):
                paper, mine = (getattr(side[one], part) / getattr(side[other], part) for side in (methods, ours))
                found.append(Cell(f"{data} {part} {one}/{other}", paper, mine, fitted=column))
    return found


def fig6_facts(numbers: Numbers) -> dict[str, Any]:
    """totals: ms of every method by data set. best: of methods at their best over `flashcp`'s."""
    providers = numbers.providers(numbers.case(data="pile", ranks=8, heads="32"))
    totals = {data: {name: breakdown(numbers, data, name).total for name in providers} for data in BREAKDOWN}
    named = ("per_document", "ring_zigzag", "ulysses", FLASHCP)
    best = {
        DATA[data]: {name: times[f"{name}_best_effort"] / times["flashcp"] for name in named}
        for data, times in totals.items()
    }
    return {"totals": totals, "best": best}


def fig6_draw(numbers: Numbers, path: Path) -> None:
    """The paper's stacked bars with ours beside them, and what ours reach beyond them."""
    panels = []
    for data, methods in BREAKDOWN.items():
        columns = {}
        for method, theirs in methods.items():
            columns[f"{method}\npaper"] = theirs
            columns[f"{method}\nours"] = breakdown(numbers, data, method)
        for provider in numbers.providers(numbers.case(data=data, ranks=8, heads="32")):
            if provider not in methods and not provider.startswith(("ring", "wlb")):
                columns[provider.replace("_best_effort", "\nbest effort")] = breakdown(numbers, data, provider)
        role = "fitted" if data == FITTED else "the check"
        title = f"{DATA[data]} ({role}): ms of one training pass, N = 8, 128K, H = 32"
        panels.append(Panel(title, {name: parts._asdict() for name, parts in columns.items()}))
    stacks(panels, path, ylabel="ms", colours=STACK)


# --- Figure 7: speedup over llama3 by window, WLB-LLM's lengths, N = 8


def fig7_cells(numbers: Numbers) -> list[Cell]:
    """Every speedup that the paper prints. That of training at 128K is made of the column of Figure 6."""
    return [
        Cell(
            f"{name} {context // 1024}K {method} over llama3",
            paper,
            _speedups(numbers, numbers.case(context=context), PASSES[name])[method],
            fitted=(name, context) == ("training", 131_072),
        )
        for name, methods in SPEEDUPS_BY_CONTEXT.items()
        for method, contexts in methods.items()
        for context, paper in contexts.items()
    ]


def fig7_facts(numbers: Numbers) -> dict[str, Any]:
    """turned: speedups that are on the other side of 1 than the paper's."""
    return {"turned": [cell.what for cell in fig7_cells(numbers) if (cell.paper < 1) != (cell.ours < 1)]}


def fig7_draw(numbers: Numbers, path: Path) -> None:
    """Two panels: inference and training."""
    panels = []
    for name, methods in SPEEDUPS_BY_CONTEXT.items():
        contexts = {context: f"{context // 1024}K" for context in methods[FLASHCP]}
        ours = {
            label: _speedups(numbers, numbers.case(context=context), PASSES[name])
            for context, label in contexts.items()
        }
        paper = {label: {m: values[context] for m, values in methods.items()} for context, label in contexts.items()}
        panels.append(Panel(f"{name}: simulated, by window", ours, paper))
    bars([panels], path, ylabel="speedup over llama3", size=(14, 4.8))


# --- Table 2: saving and imbalance of the heuristic and of an exact solver, Pile, N = 4

LABELS = {"exact": "solver"}  # in pictures: `exact` is an exchange too


def table2_cells(numbers: Numbers) -> list[Cell]:
    """The paper's two rows on windows as sampled; what the heuristic reaches of the solver's saving."""
    case = plain_case(numbers)
    found = [
        Cell(f"{method} {metric}", paper, numbers(case, method, metric))
        for method, theirs in SOLVER.items()
        for metric, paper in theirs.items()
    ]
    share = SOLVER[FLASHCP]["saving"] / SOLVER["exact"]["saving"]
    ours = numbers(case, FLASHCP, "saving") / numbers(case, "exact", "saving")
    return [*found, Cell("heuristic's saving over the solver's", share, ours)]


def plain_case(numbers: Numbers) -> str:
    """The case with the data set's own share of long documents. Raises ValueError where there is none."""
    plain = [case.name for case in numbers.cases if case.weight == 1]
    if not plain:
        raise ValueError("no rows of data.long_document_weight=1")
    return plain[0]


def table2_facts(numbers: Numbers) -> dict[str, Any]:
    """weights: savings, bound and share solved by weight of long documents. plain: those of windows as sampled."""
    providers = (FLASHCP, "flashcp_paper_tail", "flashcp", "exact")
    weights = {}
    for case in numbers.cases:
        row = {name: numbers(case.name, name, "saving") for name in providers}
        weights[case.weight] = row | {metric: numbers(case.name, "exact", metric) for metric in ("bound", "solved")}
    return {"weights": weights, "plain": weights[1]}


def table2_draw(numbers: Numbers, path: Path) -> None:
    """Savings by case, the paper's as black lines, and what the solver's bound leaves open."""
    ours = {}
    for case in numbers.cases:
        savings = {LABELS.get(p, p): numbers(case.name, p, "saving") for p in numbers.providers(case.name)}
        savings["solver's bound"] = numbers(case.name, "exact", "bound")
        savings["flashcp, exact exchange"] = numbers(case.name, "flashcp", "exact_saving")
        ours[f"Pile, long_document_weight {case.weight:g}"] = savings
    paper = {group: {LABELS.get(name, name): values["saving"] for name, values in SOLVER.items()} for group in ours}
    panel = Panel("compacted exchange, N = 4; lines: the paper's heuristic and solver", ours, paper)
    bars([[panel]], path, ylabel="saving against the all-gather", size=(10, 4.8))
