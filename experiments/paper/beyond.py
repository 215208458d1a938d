"""Past the paper: where a speedup comes from, one change at a time; the fastest method by work and network; and the
simulator against reality."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from flashcp.experiments.paper.numbers import DATA as TITLES
from flashcp.experiments.paper.numbers import Cell, Numbers, PaperFigure
from flashcp.experiments.plots import INK, PALETTE, ends, legend_below, spread, styled
from flashcp.experiments.sweep.results import MEASURED, RESULTS, Row, read_rows
from flashcp.sharding.methods import METHODS

DATA = ("wlb_llm", "pile")

# --- from a published method to `flashcp`

BASELINES = {"llama3": "per_sequence", "per_document": "per_document", "flashcp_paper": "flashcp_paper"}
CHANGES = ("as published", "no copies", "overlap", "only rows that are read", "our plan")


class Stage(NamedTuple):
    """A method on its way: what was changed last, the module's ms then, and the speedup of that change alone."""

    change: str
    ms: float
    speedup: float


def stages(numbers: Numbers, data: str, baseline: str) -> list[Stage]:
    """From a published method to ours."""
    none, staged = (numbers.case(data=data, overlap=overlap) for overlap in ("none", "staged"))
    best, exact = f"{baseline}_best_effort", f"{BASELINES[baseline]}+exact"
    way = ((none, baseline), (none, best), (staged, best), (staged, exact), (staged, "flashcp"))
    times = [numbers(case, provider, "module_ms") for case, provider in way]
    before = [times[0], *times[:-1]]
    return [Stage(change, ms, was / ms) for change, ms, was in zip(CHANGES, times, before, strict=True)]


def _ways(numbers: Numbers) -> dict[str, Any]:
    """ways: lengths, method and stages of each."""
    ways = [(TITLES[data], method, stages(numbers, data, method)) for data, method in product(DATA, BASELINES)]
    return {"changes": CHANGES, "ways": ways}


@styled
def _draw_ways(numbers: Numbers, path: Path) -> None:
    """A panel for data and baseline: the module's time after each change, and what the change was worth."""
    figure = Figure(figsize=(15, 5.5))
    grid = figure.subplots(len(DATA), len(BASELINES), sharey=True, sharex="row")
    for axes, (title, method, found) in zip(grid.flat, _ways(numbers)["ways"], strict=True):
        axes.barh([stage.change for stage in found], [stage.ms for stage in found], color=PALETTE[: len(found)])
        for place, stage in enumerate(found):
            text = f" {stage.ms:.1f} ms" + (f", {stage.speedup:.2f}x" if place else "")
            axes.text(stage.ms, place, text, va="center", fontsize=8.5)
        axes.set_title(f"{title}, {method} to flashcp: {found[0].ms / found[-1].ms:.2f}x")
        axes.grid(visible=False)
        axes.set(xlim=(0, max(axes.get_xlim()[1], 1.25 * found[0].ms)), xlabel="ms")  # a row of panels shares it
    grid[0][0].invert_yaxis()  # all panels share it
    figure.suptitle("simulated: one training pass of the attention module, N = 8, 128K, H = 32")
    figure.savefig(path)


# --- who wins where, each with our kernel and no copies

CLUSTERS = {
    "h100-nvlink": "nodes of 8 (NVLink), 400 Gb/s a rank between them",
    "h100-ib-400g": "one rank a node, 400 Gb/s",
}


class Win(NamedTuple):
    """A case's fastest method, how much slower the next one is, and the speedup over llama3 as published."""

    case: Any
    fastest: str
    ahead: float
    speedup: float


def wins(numbers: Numbers) -> list[Win]:
    """The fastest method of every case."""
    found = []
    for case in numbers.cases:
        times = {name: ms for name, ms in numbers.of(case.name, "module_ms").items() if name != "flashcp:h1"}
        (best, name), (following, _) = sorted((ms, name) for name, ms in times.items())[:2]
        found.append(Win(case, name, following / best, numbers(case.name, name, "speedup")))
    return found


def _won(numbers: Numbers) -> dict[str, Any]:
    """won: cases by method. close: those won by less than 5%. behind: cases in which a best effort is more than 3%
    ahead of `flashcp`, and how far. alone: those in which it would be without head ranks. chosen: cases by head
    ranks."""
    found, ahead, alone = wins(numbers), {}, 0
    for win in found:
        ms = numbers.of(win.case.name, "module_ms")
        best = min(value for name, value in ms.items() if name.endswith("_best_effort"))
        ahead[win.case.name] = ms["flashcp"] / best
        alone += ms.get("flashcp:h1", ms["flashcp"]) > 1.03 * best  # one line where a sweep has one head rank alone
    return {
        "won": Counter(win.fastest for win in found).most_common(),
        "close": sum(win.ahead < 1.05 for win in found),
        "cases": len(found),
        "behind": {name: ratio for name, ratio in ahead.items() if ratio > 1.03},
        "alone": alone,
        "chosen": sorted(Counter(int(row.median) for row in numbers.rows if _chosen(row)).items()),
    }


def _chosen(row: Row) -> bool:
    return (row.provider, row.metric) == ("flashcp", "head_ranks")


@styled
def _draw_wins(numbers: Numbers, path: Path) -> None:
    """One panel for data, cluster and heads: ranks across, windows up; colour: the fastest; how far it is ahead."""
    every, count = wins(numbers), _won(numbers)["won"]
    colour = {name: PALETTE[(place + 1) % len(PALETTE)] for place, (name, _) in enumerate(count)}
    figure = Figure(figsize=(16, 8.4))
    panels = product(DATA, CLUSTERS, ("32", "32:8"))
    for axes, (data, cluster, heads) in zip(figure.subplots(len(DATA), 4).flat, panels, strict=True):
        chosen = [win for win in every if (win.case.data, win.case.cluster, win.case.heads) == (data, cluster, heads)]
        _draw_squares(axes, chosen, colour)
        axes.set_title(f"{data}, {heads} heads\n{CLUSTERS[cluster]}", fontsize=9)
    legend_below(figure, {f"{name} ({number})": colour[name] for name, number in count})
    figure.suptitle("fastest method, simulated; how far ahead of the next; below, of llama3 as published")
    figure.savefig(path)


def _draw_squares(axes: Any, chosen: list[Win], colour: dict[str, str]) -> None:
    ranks = sorted({win.case.ranks for win in chosen})
    contexts = sorted({win.case.context for win in chosen})
    for win in chosen:
        x, y = ranks.index(win.case.ranks), contexts.index(win.case.context)
        axes.add_patch(Rectangle((x, y), 0.97, 0.97, color=colour[win.fastest], alpha=0.85, linewidth=0))
        text = f"{win.ahead:.2f}x\n{win.speedup:.1f}x"
        axes.text(x + 0.48, y + 0.48, text, ha="center", va="center", fontsize=8, color="white")
    axes.set(xlim=(0, len(ranks)), ylim=(0, len(contexts)), xlabel="ranks", ylabel="window")
    axes.set_xticks([x + 0.48 for x in range(len(ranks))], ranks)
    axes.set_yticks([y + 0.48 for y in range(len(contexts))], [f"{context // 1024}K" for context in contexts])
    axes.tick_params(labelsize=8, length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


# --- the demo's runs on two CPU ranks, measured beside their prediction

METRICS = ("step_ms", "attention_ms", "exposed_exchange_ms")
LLAMA3 = "llama3"


def measured_rows(folders: Sequence[str]) -> list[Row]:
    """Times of several sweeps of the same runs, one row each: median, p20 and p80 over the sweeps' medians.

    Of one sweep its own row. Raises ValueError for a directory without rows.
    """
    every: dict[tuple[str, str, str], list[Row]] = {}
    for folder in folders:
        rows = read_rows(Path(folder))
        if not rows:
            raise ValueError(f"measured={folder!r}: no {RESULTS} in it; expected the directory of a sweep")
        for row in rows:
            if row.kind == MEASURED and row.metric in METRICS and row.provider in METHODS:
                every.setdefault((row.case, row.provider, row.metric), []).append(row)
    merged = []
    for first, *others in every.values():
        p20, median, p80 = np.percentile([first.median, *(row.median for row in others)], (20, 50, 80)).tolist()
        merged.append(replace(first, p20=p20, median=median, p80=p80) if others else first)
    return merged


def _steps(numbers: Numbers) -> dict[str, tuple[Row, float]]:
    """By method: its measured step, and the predicted one. Raises ValueError where the baseline lacks one of them."""
    measured = {row.provider: row for row in numbers.rows if row.kind == MEASURED and row.metric == "step_ms"}
    if LLAMA3 not in measured:
        raise ValueError(f"no measured step of {LLAMA3}: name directories that hold one in measured=[DIR,...]")
    case = next((row.case for row in numbers.rows if row.kind != MEASURED), "")
    found = {}
    for method, row in measured.items():
        pair = "+".join(METHODS[method][1:])  # our implementation, which is what the demo runs
        found[method] = (row, numbers(case, pair if pair in numbers.providers(case) else method, "step_ms"))
    return found


def _told_apart(steps: dict[str, tuple[Row, float]]) -> dict[tuple[str, str], bool]:
    """Pairs of methods whose p20 to p80 do not overlap, and whether they are predicted in the measured order."""
    found = {}
    for (one, (a, predicted_a)), (other, (b, predicted_b)) in combinations(steps.items(), 2):
        low, high = sorted((a, b), key=lambda row: row.median)
        if ends(high)[0] > ends(low)[1]:
            found[one, other] = (a.median < b.median) == (predicted_a < predicted_b)
    return found


def _demo_cells(numbers: Numbers) -> list[Cell]:
    """Speedups over llama3 within a fifth; every pair of methods that measurements tell apart in the same order."""
    steps = _steps(numbers)
    base, predicted_base = steps[LLAMA3]
    found = [
        Cell(f"{method}, step, speedup over {LLAMA3}", base.median / row.median, predicted_base / ms, allowed=0.20)
        for method, (row, ms) in steps.items()
        if method != LLAMA3
    ]
    if pairs := _told_apart(steps):
        found.append(Cell("pairs of methods in the measured order", len(pairs), sum(pairs.values()), allowed=0.0))
    return found


def _demo_facts(numbers: Numbers) -> dict[str, Any]:
    """measured, predicted: one row of each. pairs of methods; told_apart: how many of them; wrong: those out of order.
    outside: methods whose predicted step over the baseline's lies outside their measured p20 to p80 over its median."""
    steps = _steps(numbers)
    told_apart = _told_apart(steps)
    base, predicted_base = steps[LLAMA3]
    expected = {method: ms / predicted_base * base.median for method, (_, ms) in steps.items() if method != LLAMA3}
    return {
        "measured": base,
        "predicted": next(row for row in numbers.rows if row.kind != MEASURED),
        "pairs": comb(len(steps), 2),
        "told_apart": len(told_apart),
        "wrong": [" and ".join(pair) for pair, in_order in told_apart.items() if not in_order],
        "outside": [m for m, ms in expected.items() if not ends(steps[m][0])[0] <= ms <= ends(steps[m][0])[1]],
    }


@styled
def _draw_demo(numbers: Numbers, path: Path) -> None:
    """Measured steps (bars, p20 to p80) and predicted ones (dots), both over llama3's."""
    steps = _steps(numbers)
    base, predicted_base = steps[LLAMA3]
    rows, predicted = zip(*steps.values(), strict=True)
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    look: dict[str, Any] = {"color": PALETTE[0], "ecolor": INK, "capsize": 3, "label": "measured"}
    axes.bar(list(steps), [row.median / base.median for row in rows], yerr=spread(rows) / base.median, **look)
    dots = [ms / predicted_base for ms in predicted]
    axes.plot(list(steps), dots, "o", color=PALETTE[2], markersize=9, label="predicted")
    axes.set_ylabel("step time over llama3's (lower: faster)")
    axes.set_title("the demo on two CPU ranks; error bars: p20 to p80 of repeated sweeps")
    axes.tick_params(axis="x", labelrotation=20)
    axes.legend()
    figure.savefig(path)


DEMO = PaperFigure("the simulator against reality: the demo's two CPU ranks", _draw_demo, _demo_cells, _demo_facts)
FIGURES = {
    "demo_predicted": DEMO,
    "demo_hybrid": DEMO._replace(title="the same, with every rank's kernels run and the exchange modelled"),
    "speedup_parts": PaperFigure("where a speedup comes from, one change at a time", _draw_ways, facts=_ways),
    "beyond_paper": PaperFigure("where each method wins", _draw_wins, facts=_won),
}
