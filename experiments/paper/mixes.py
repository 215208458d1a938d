"""Models whose layers differ: plans for the sum of their work beside methods that know nothing of it."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from flashcp.experiments.paper.numbers import Numbers, PaperFigure
from flashcp.experiments.plots import PALETTE, legend_below, styled
from flashcp.experiments.sweep.results import Row
from flashcp.simulator.variants import VARIANTS

MODELS = {
    ("32:16", "w1024.0x52.62"): "Gemma 3 27B",
    ("64:8", "w128.0x18.36"): "gpt-oss 120B",
    ("16", "full"): "BERT large",
}
"""By heads and mask of a case."""
WORKLOADS = {"Gemma 3 27B": "gemma3", "gpt-oss 120B": "gpt_oss", "BERT large": "full"}
"""The same in the rows of `flashcp bench mixes`."""
KINDS = ("per_document as published", "best effort of the others", "flashcp")


class Mixed(NamedTuple):
    """A case: speedups over llama3 as published, in the order of KINDS. rival: the fastest of the best efforts.

    imbalance: of flashcp's plan and of per_document's. rows: critical ones of a mean layer, of both.
    """

    model: str
    case: Any
    speedups: tuple[float, float, float]
    rival: str
    step: float
    imbalance: tuple[float, float]
    rows: tuple[float, float]
    head_ranks: int


def mixed(numbers: Numbers) -> list[Mixed]:
    """Every case of the rows, in order."""
    found = []
    for case in numbers.cases:
        speedups = numbers.of(case.name, "speedup")
        rival = max((s, n) for n, s in speedups.items() if VARIANTS[n].implementation == "best effort")

        def both(metric: str, name: str = case.name) -> tuple[float, float]:
            of = numbers.of(name, metric)
            return of["flashcp"], of["per_document"]

        found.append(
            Mixed(
                MODELS[case.heads, case.mask], case, (speedups["per_document"], rival[0], speedups["flashcp"]),
                rival[1].removesuffix("_best_effort"), numbers(case.name, "flashcp", "step_speedup"),
                both("imbalance"), both("critical_rows"), int(numbers(case.name, "flashcp", "head_ranks")),
            )
        )  # fmt: skip
    return found


def worth_table(simulated: Sequence[Row], planned: Path) -> str:
    """What a plan for the mix is worth, as docs/masks.md shows it: rows of `experiment=mixes`, and the file of
    `flashcp bench mixes` on the same lengths."""
    with planned.open(encoding="utf-8", newline="") as lines:
        counted = {(row["case"], row["provider"], row["metric"]): row["median"] for row in csv.DictReader(lines)}
    head = (
        "model", "window, ranks", "largest imbalance: the mix's plan, the causal one's",
        "critical rows: a layer that sees all, a window layer", "over llama3", "over per_document",
        "over the fastest best effort",
    )  # fmt: skip
    table = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for one in mixed(Numbers(simulated)):
        size = f"{one.case.context // 1024}K"
        case = f"{WORKLOADS[one.model]} {one.case.data} {size} N={one.case.ranks}"
        balance = [float(counted[case, plan, "imbalance_max"]) for plan in ("flashcp", "flashcp_causal")]
        rows = [counted.get((case, "flashcp", f"critical_rows_{kind}")) for kind in ("causal", "window")]
        published, rival, ours = one.speedups
        cells = (
            one.model, f"{size}, {one.case.ranks}", ", ".join(f"{number:.3f}" for number in balance),
            ", ".join(f"{float(number):,.0f}" if number else "-" for number in rows), f"{ours:.2f}",
            f"{ours / published:.2f}", f"{ours / rival:.2f} ({one.rival})",
        )  # fmt: skip
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def _facts(numbers: Numbers) -> dict[str, Any]:
    return {"mixed": mixed(numbers)}


@styled
def _draw(numbers: Numbers, path: Path) -> None:
    """A panel for each model: windows and ranks across, speedups over llama3."""
    found, colours = mixed(numbers), dict(zip(KINDS, PALETTE, strict=False))
    models = list(dict.fromkeys(one.model for one in found))
    figure = Figure(figsize=(4.8 * len(models), 4.2))
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        chosen = [one for one in found if one.model == model]
        places, width = np.arange(len(chosen)), 0.8 / len(KINDS)
        for number, kind in enumerate(KINDS):
            at = places + (number - (len(KINDS) - 1) / 2) * width
            axes.bar(at, [one.speedups[number] for one in chosen], width, color=colours[kind])
        labels = [f"{one.case.context // 1024}K,\n{one.case.ranks}" for one in chosen]
        axes.set_xticks(places, labels)
        axes.set(title=model, ylabel="speedup over llama3", xlabel="window, ranks")
    legend_below(figure, colours)
    figure.suptitle("simulated: attention of a mean layer, forward and backward")
    figure.savefig(path)


FIGURES = {"mixes": PaperFigure("models whose layers differ", _draw, facts=_facts)}
