"""`flashcp bench paper_fit`: the H100's parameters, fitted to one column of the paper's breakdown table (WLB-LLM).

From that column come: the attention's tflops (forward and backward), the link's rate, the passes of the published
copies, and `long_document_weight`, without which no window of these lengths holds as much work as the paper's did. All
else is a datasheet's or stated as an assumption. The Pile's column is never looked at: it is the check.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flashcp.clusters import read_cluster
from flashcp.experiments.bench.calibration import cluster_text
from flashcp.experiments.paper.numbers import BREAKDOWN, Breakdown
from flashcp.experiments.sweep.results import commit
from flashcp.sharding.lengths import windows
from flashcp.sharding.strategies import plan
from flashcp.simulator.cost import AttentionShape
from flashcp.simulator.machine import Machine, PublishedCopies
from flashcp.simulator.planned import Planned, Setting

CLUSTER = "h100-nvlink"
"""What the fit writes is its file; all that is not fitted is read there, with where it comes from. The column cannot
tell the launches of a shard, which are assumed, from the passes."""
WORLD_SIZE, CONTEXT = 8, 131_072
SHAPE = AttentionShape()
STRATEGIES = {"llama3": "per_sequence", "per_document": "per_document", "flashcp_paper": "flashcp_paper"}
COLUMN = BREAKDOWN["wlb_llm"]
THEIRS = np.array(list(COLUMN.values()))  # [methods, parts]


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
    machine = _with_tflops(_with_link(read_cluster(CLUSTER)), [350.0, 300.0])
    planned = {
        method: [Planned(plan(pack, WORLD_SIZE, strategy), Setting(machine)) for pack in packs]
        for method, strategy in STRATEGIES.items()
    }
    for _ in range(4):  # the times are nearly proportional to 1 / tflops
        ratios = np.exp(np.mean(np.log(_attention_ms(planned, machine) / THEIRS[:, 1:3]), axis=0)).tolist()
        kernels = (machine.attention.forward, machine.attention.backward)
        machine = _with_tflops(machine, [one.tflops * ratio for one, ratio in zip(kernels, ratios, strict=True)])
    machine = replace(machine, published=_passes(planned, machine), provenance=_provenance(machine, weight, count))
    collectives = []
    for method, each in planned.items():
        exchange = "compacted" if method == "flashcp_paper" else "all_gather"
        moved = [machine.links.collective_us(p.block_bytes(exchange), WORLD_SIZE) for p in each]
        collectives.append(float(np.mean(moved)) / 1e3)
    ours = np.column_stack([THEIRS[:, 0], _attention_ms(planned, machine), collectives, collectives])
    breakdown = {method: Breakdown(*parts) for method, parts in zip(COLUMN, ours.tolist(), strict=True)}
    return Fit(weight, machine, breakdown, float(np.mean(np.square(np.log(ours / THEIRS)))))


def _with_link(machine: Machine) -> Machine:
    """The link carries the paper's all-gather and reduce-scatter in their time."""
    node, hops = machine.links.node, WORLD_SIZE - 1
    carried = hops * CONTEXT / WORLD_SIZE * SHAPE.kv_bytes
    gbps = float(carried / (1e3 * np.mean(THEIRS[:2, 3:]) - hops * node.latency_us) / 1e3)
    return replace(machine, links=replace(machine.links, node=replace(node, gbps=gbps)))


def _with_tflops(machine: Machine, tflops: Sequence[float]) -> Machine:
    """tflops: forward and backward."""
    attention = machine.attention
    forward, backward = replace(attention.forward, tflops=tflops[0]), replace(attention.backward, tflops=tflops[1])
    return replace(machine, attention=replace(attention, forward=forward, backward=backward))


def _passes(planned: Mapping[str, Sequence[Planned]], machine: Machine) -> PublishedCopies:
    """What is left of the paper's copies besides launches, in passes over the window's K and V."""
    shards = {method: float(np.mean([len(p.reads.rank) for p in each])) for method, each in planned.items()}
    shards["llama3"] = 2 * WORLD_SIZE  # it puts chunks in order, not documents
    pass_ms = 2 * CONTEXT * SHAPE.kv_bytes / (1e6 * machine.copies.gbps)
    left_ms = THEIRS[:, 0] - np.array(list(shards.values())) * machine.published.shard_us / 1e3
    gathered, shuffled, compacted = (left_ms / pass_ms).tolist()
    return PublishedCopies(gathered, shuffled, compacted, machine.published.shard_us, machine.published.sync_us)


def _attention_ms(planned: Mapping[str, Sequence[Planned]], machine: Machine) -> np.ndarray:
    """Mean over packs of the slowest rank's attention [methods, 2], forward and backward."""
    times = [
        [[p.priced(machine.attention, backward).max() / 1e3 for p in each] for backward in (False, True)]
        for each in planned.values()
    ]
    return np.mean(times, axis=2)


def _provenance(machine: Machine, weight: float, count: int) -> dict[str, str]:
    fitted = (
        f"fitted to the WLB-LLM column of the paper's breakdown table (H100 SXM, 8 ranks, 128K, 32 heads), "
        f"{count} windows with long_document_weight {weight:g}, commit {commit()}, {datetime.date.today().isoformat()}"
    )
    named = ("attention.forward.tflops", "attention.backward.tflops", "published")
    return machine.provenance | dict.fromkeys(named, fitted)


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
