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

from flashcp.experiments.bench.calibration import cluster_text
from flashcp.experiments.paper.values import BREAKDOWN, Breakdown
from flashcp.experiments.provenance import commit
from flashcp.sharding.lengths import windows
from flashcp.sharding.strategies import plan
from flashcp.simulator.cost import AttentionCost, AttentionShape, CopyCost, KernelCost, Link, Links
from flashcp.simulator.machine import Machine, PublishedCopies
from flashcp.simulator.planned import Planned, Setting

__all__ = ["Fit", "PaperFit", "fit_machine", "fit_rows", "fit_table", "fit_weight", "write_fit"]

WORLD_SIZE, CONTEXT = 8, 131_072
SHAPE = AttentionShape()
STRATEGIES = {"llama3": "per_sequence", "per_document": "per_document", "flashcp_paper": "flashcp_paper"}
COLUMN = BREAKDOWN["wlb_llm"]
MEMORY_GBPS = 3350.0  # H100 SXM datasheet
COPY_SHARE = 0.8  # of it, for copies that read and write whole rows
NVLINK_LATENCY_US = 2.0
LAUNCH_US = 5.0
SHARD_US = 8.0  # four launches (K and V, forward and backward) of 2 us: the column cannot tell it from the passes
SYNC_US = 40.0  # ring-flash-attention's table: its zigzag loses 1.4 ms to 37 of them


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
    if settings.windows < 1:
        raise ValueError(f"windows={settings.windows}: expected a whole number >= 1")
    if settings.seed < 0:
        raise ValueError(f"seed={settings.seed}: expected a whole number >= 0")
    if not settings.weights or not all(0 < weight < math.inf for weight in settings.weights):
        raise ValueError(f"weights={settings.weights}: expected numbers > 0, at least one")
    for weight in settings.weights:
        yield fit_weight(weight, settings.windows, settings.seed)


def fit_weight(weight: float, count: int, seed: int) -> Fit:
    """All parameters for one long_document_weight."""
    packs = list(windows("wlb_llm", CONTEXT, count, seed, long_document_weight=weight))
    machine = fit_machine(350.0, 300.0)
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
        machine = fit_machine(machine.attention.forward.tflops * forward, machine.attention.backward.tflops * backward)
    shards = {method: float(np.mean([len(p.reads.rank) for p in each])) for method, each in planned.items()}
    shards["llama3"] = 2 * WORLD_SIZE  # it puts chunks in order, not documents
    window_ms = 2 * CONTEXT * SHAPE.kv_bytes / (1e6 * machine.copies.gbps)  # one pass
    passes = {m: (COLUMN[m].copies - shards[m] * SHARD_US / 1e3) / window_ms for m in COLUMN}
    costs = PublishedCopies(passes["llama3"], passes["per_document"], passes["flashcp_paper"], SHARD_US, SYNC_US)
    machine = replace(machine, published=costs)
    ours = _attention_ms(planned, machine)
    breakdown = {}
    for method, each in planned.items():
        exchange = "compacted" if method == "flashcp_paper" else "all_gather"
        moved = [machine.links.collective_us(p.block_bytes(exchange), WORLD_SIZE) for p in each]
        collective = float(np.mean(moved)) / 1e3
        breakdown[method] = Breakdown(COLUMN[method].copies, *ours[method], collective, collective)
    logs = [
        math.log(mine / theirs)
        for method, parts in breakdown.items()
        for mine, theirs in zip(parts, COLUMN[method], strict=True)
    ]
    return Fit(weight, _with_provenance(machine, weight, count), breakdown, float(np.mean(np.square(logs))))


def fit_machine(forward_tflops: float, backward_tflops: float) -> Machine:
    """An H100 whose attention reaches these rates; the link carries the paper's all-gather in its time."""
    memory = {"kv_gbps": MEMORY_GBPS, "query_gbps": MEMORY_GBPS, "launch_us": LAUNCH_US}
    theirs = np.mean([COLUMN[m][3:] for m in ("llama3", "per_document")])
    hops = WORLD_SIZE - 1
    carried = hops * CONTEXT / WORLD_SIZE * SHAPE.kv_bytes
    nvlink = carried / (theirs * 1e3 - hops * NVLINK_LATENCY_US) / 1e3
    return Machine(
        name="h100-nvlink",
        attention=AttentionCost(KernelCost(forward_tflops, **memory), KernelCost(backward_tflops, **memory)),
        copies=CopyCost(gbps=COPY_SHARE * MEMORY_GBPS, launch_us=2.0),
        links=Links(8, Link(float(nvlink), NVLINK_LATENCY_US), Link(50.0, 5.0)),
        gemm_tflops=600.0,
        published=PublishedCopies(1.0, 1.0, 1.0, SHARD_US, SYNC_US),
    )


def _attention_ms(planned: dict[str, list[Planned]], machine: Machine) -> dict[str, tuple[float, float]]:
    """Mean over packs of the slowest rank's attention, forward and backward."""
    times = {}
    for method, each in planned.items():
        both = [[p.priced(machine.attention, backward).max() / 1e3 for p in each] for backward in (False, True)]
        times[method] = (float(np.mean(both[0])), float(np.mean(both[1])))
    return times


def _with_provenance(machine: Machine, weight: float, count: int) -> Machine:
    today = datetime.date.today().isoformat()
    fitted = (
        f"fitted to the WLB-LLM column of the paper's breakdown table (H100 SXM, 8 ranks, 128K, 32 heads), "
        f"{count} windows with long_document_weight {weight:g}, commit {commit()}, {today}"
    )
    return replace(
        machine,
        provenance={
            "attention": "assumption: tiles of 128 x 64 rows as FlashAttention cuts them, launches of 5 us",
            "attention.forward.tflops": fitted,
            "attention.backward.tflops": fitted,
            "attention.forward.kv_gbps": "datasheet: HBM3, 3.35 TB/s",
            "attention.forward.query_gbps": "datasheet: HBM3, 3.35 TB/s",
            "attention.backward.kv_gbps": "datasheet: HBM3, 3.35 TB/s",
            "attention.backward.query_gbps": "datasheet: HBM3, 3.35 TB/s",
            "copies": "assumption: 0.8 of the datasheet's 3.35 TB/s, launches of 2 us",
            "links.ranks_per_node": "datasheet: DGX H100",
            "links.node.gbps": "read off the paper: 5.45 ms for its all-gather and reduce-scatter of 1.88 GB a rank",
            "links.node.latency_us": "assumption",
            "links.network": "datasheet: 400 Gb/s a rank; the latency is an assumption",
            "gemm_tflops": "assumption: 0.6 of the datasheet's 989 dense bf16",
            "published": fitted,
            "published.shard_us": "assumption: four launches of 2 us",
            "published.sync_us": "estimate: what ring-flash-attention's own table leaves for 37 of them (8 H800)",
        },
    )


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
