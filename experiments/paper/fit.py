"""`flashcp bench paper_fit`: the H100's parameters, fitted to one column of the paper's breakdown table (WLB-LLM).

From that column come: the attention's tflops (forward and backward), the link's rate, the passes of the published
copies, and `long_document_weight`, without which no window of these lengths holds as much work as the paper's did. All
else is a datasheet's or stated as an assumption. The Pile's column is never looked at: it is the check.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flashcp.clusters import read_cluster
from flashcp.experiments.bench.cluster_text import cluster_text
from flashcp.experiments.paper.numbers import BREAKDOWN, Breakdown
from flashcp.experiments.provenance import commit
from flashcp.sharding.lengths import windows
from flashcp.sharding.strategies import plan
from flashcp.simulator.cost import AttentionShape
from flashcp.simulator.machine import Machine, PublishedCopies
from flashcp.simulator.planned import Planned, Setting

__all__ = ["Fit", "PaperFit", "fit_rows", "fit_table", "write_fit"]

CLUSTER = "h100-nvlink"
"""What the fit writes is its file; all that is not fitted is read there, with where it comes from. The column cannot
tell the launches of a shard, which are assumed, from the passes."""
WORLD_SIZE, CONTEXT = 8, 131_072
SHAPE = AttentionShape()
STRATEGIES = {"llama3": "per_sequence", "per_document": "per_document", "flashcp_paper": "flashcp_paper"}
COLUMN = BREAKDOWN["wlb_llm"]


@dataclass
class PaperFit:
    """weights: values of long_document_weight to try. windows: packs for each."""

    weights: list[float] = field(default_factory=lambda: [6.0, 8.0, 10.0, 11.0, 12.0, 13.0, 14.0, 16.0, 20.0, 30.0])
    windows: int = 500
    seed: int = 0


class Fit(NamedTuple):
    """What one weight comes to: the machine, the breakdown by method, and the mean squared log of ours over theirs."""

    weight: float
    machine: Machine
    breakdown: dict[str, Breakdown]
    error: float


def fit_rows(settings: PaperFit) -> Iterator[Fit]:
    """The fit for every weight. Raises ValueError naming value, field and what is legal."""
    for name, least in (("windows", 1), ("seed", 0)):
        if getattr(settings, name) < least:
            raise ValueError(f"{name}={getattr(settings, name)}: expected a whole number >= {least}")
    if not settings.weights or not all(0 < weight < math.inf for weight in settings.weights):
        raise ValueError(f"weights={settings.weights}: expected numbers > 0, at least one")
    for weight in settings.weights:
        yield _fit(weight, settings.windows, settings.seed)


def _fit(weight: float, count: int, seed: int) -> Fit:
    """All parameters for one long_document_weight."""
    packs = list(windows("wlb_llm", CONTEXT, count, seed, long_document_weight=weight))
    machine = _with_tflops(_with_link(read_cluster(CLUSTER)), 350.0, 300.0)
    planned = {
        method: [Planned(plan(pack, WORLD_SIZE, strategy), Setting(machine)) for pack in packs]
        for method, strategy in STRATEGIES.items()
    }
    for _ in range(4):  # the times are nearly proportional to 1 / tflops
        ours = _attention_ms(planned, machine)
        forward, backward = (
            math.exp(np.mean([math.log(ours[m][i] / getattr(COLUMN[m], part)) for m in COLUMN]))
            for i, part in enumerate(("attention_forward", "attention_backward"))
        )
        kernels = machine.attention
        machine = _with_tflops(machine, kernels.forward.tflops * forward, kernels.backward.tflops * backward)
    machine = replace(machine, published=_passes(planned, machine), provenance=_provenance(machine, weight, count))
    ours, breakdown = _attention_ms(planned, machine), {}
    for method, each in planned.items():
        exchange = "compacted" if method == "flashcp_paper" else "all_gather"
        moved = [machine.links.collective_us(p.block_bytes(exchange), WORLD_SIZE) for p in each]
        collective = float(np.mean(moved)) / 1e3
        breakdown[method] = Breakdown(COLUMN[method].copies, *ours[method], collective, collective)
    pairs = [pair for method, parts in breakdown.items() for pair in zip(parts, COLUMN[method], strict=True)]
    error = float(np.mean(np.square([math.log(mine / theirs) for mine, theirs in pairs])))
    return Fit(weight, machine, breakdown, error)


def _with_link(machine: Machine) -> Machine:
    """The link carries the paper's all-gather and reduce-scatter in their time."""
    node, hops = machine.links.node, WORLD_SIZE - 1
    collective_us = 1e3 * np.mean([COLUMN[method][3:] for method in ("llama3", "per_document")])
    carried = hops * CONTEXT / WORLD_SIZE * SHAPE.kv_bytes
    gbps = float(carried / (collective_us - hops * node.latency_us) / 1e3)
    return replace(machine, links=replace(machine.links, node=replace(node, gbps=gbps)))


def _with_tflops(machine: Machine, forward: float, backward: float) -> Machine:
    attention, old = machine.attention, (machine.attention.forward, machine.attention.backward)
    new = [replace(kernel, tflops=tflops) for kernel, tflops in zip(old, (forward, backward), strict=True)]
    return replace(machine, attention=replace(attention, forward=new[0], backward=new[1]))


def _passes(planned: dict[str, list[Planned]], machine: Machine) -> PublishedCopies:
    """What is left of the paper's copies besides launches, in passes over the window's K and V."""
    shards = {method: float(np.mean([len(p.reads.rank) for p in each])) for method, each in planned.items()}
    shards["llama3"] = 2 * WORLD_SIZE  # it puts chunks in order, not documents
    window_ms = 2 * CONTEXT * SHAPE.kv_bytes / (1e6 * machine.copies.gbps)
    launches_ms = {method: count * machine.published.shard_us / 1e3 for method, count in shards.items()}
    passes = {method: (COLUMN[method].copies - launches_ms[method]) / window_ms for method in COLUMN}
    return replace(
        machine.published,
        gathered_passes=passes["llama3"],
        shuffled_passes=passes["per_document"],
        compacted_passes=passes["flashcp_paper"],
    )


def _attention_ms(planned: dict[str, list[Planned]], machine: Machine) -> dict[str, tuple[float, float]]:
    """Mean over packs of the slowest rank's attention, forward and backward."""
    times = {}
    for method, each in planned.items():
        both = [[p.priced(machine.attention, backward).max() / 1e3 for p in each] for backward in (False, True)]
        times[method] = (float(np.mean(both[0])), float(np.mean(both[1])))
    return times


def _provenance(machine: Machine, weight: float, count: int) -> dict[str, str]:
    fitted = (
        f"fitted to the WLB-LLM column of the paper's breakdown table (H100 SXM, 8 ranks, 128K, 32 heads), "
        f"{count} windows with long_document_weight {weight:g}, commit {commit()}, {datetime.date.today().isoformat()}"
    )
    fitted_parameters = ("attention.forward.tflops", "attention.backward.tflops", "published")
    return machine.provenance | dict.fromkeys(fitted_parameters, fitted)


def fit_table(fits: list[Fit]) -> str:
    """Each weight's error, and the best one's column beside the paper's."""
    best = min(fits, key=lambda fit: fit.error)
    lines = ["long_document_weight  mean error  tflops forward  backward"]
    for fit in fits:
        attention = fit.machine.attention
        lines.append(
            f"{fit.weight:>20g}  {100 * math.sqrt(fit.error):>9.1f}%  {attention.forward.tflops:>14.0f}  "
            f"{attention.backward.tflops:>8.0f}{'  <- chosen' if fit is best else ''}"
        )
    for method, parts in best.breakdown.items():
        shown = " / ".join(f"{mine:.1f} ({theirs:g})" for mine, theirs in zip(parts, COLUMN[method], strict=True))
        lines.append(f"{method:<14} {shown} = {parts.total:.1f} ({COLUMN[method].total:.1f})")
    return "\n".join([*lines, "copies / forward / backward / all-gather / reduce-scatter, the paper's in brackets"])


def write_fit(path: Path, fits: list[Fit]) -> None:
    """The best fit's machine as a file of `conf/cluster/`."""
    best = min(fits, key=lambda fit: fit.error)
    about = "flashcp simulate cluster=h100-nvlink; made by flashcp bench paper_fit"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(cluster_text(best.machine, about), encoding="utf-8")
