"""What the simulator says of a lab before the lab runs: each method's time, from its rates and its links alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np

from flashcp.clusters import read_cluster
from flashcp.experiments.lab.cases import LabBench, Work
from flashcp.simulation import simulate
from flashcp.simulator.cost import BACKWARD_FLOPS, FORWARD_FLOPS, Link, Links
from flashcp.simulator.machine import Machine

__all__ = ["RATED", "Rates", "lab_machine", "predicted_ms"]

RATED = (2048, 1024, 512, 256, 128, 64, 64)
"""Documents that the rate of attention is measured on."""
CALIBRATED = "this_machine"
"""The cluster file whose kernels are those of the lab's ranks, on a core of their own."""
Costs = TypeVar("Costs")


@dataclass(frozen=True)
class Rates:
    """What was measured in a lab before it runs.

    tflops: 10^12 attention operations a second of the slowest rank, all at once, forward and backward. latency_us: of
    an exchange of one row a rank, one pass of the operator. node_gbps: GB/s between two ranks of a node.
    """

    tflops: float
    latency_us: float
    node_gbps: float


def lab_machine(bench: LabBench, rates: Rates, link_gbps: float) -> Machine:
    """The lab as the simulator knows machines. link_gbps: GB/s of a node's link.

    Its kernels are the calibrated ones, all slower by one factor: a rank has a share of a core.
    """
    whole = read_cluster(CALIBRATED)
    share = rates.tflops / _tflops(whole, bench)
    attention = whole.attention
    return replace(
        whole,
        name="lab",
        attention=replace(
            attention, forward=_slowed(attention.forward, share), backward=_slowed(attention.backward, share)
        ),
        copies=_slowed(whole.copies, share),
        gemm_tflops=share * whole.gemm_tflops,
        links=Links(
            bench.ranks_per_node,
            Link(rates.node_gbps, rates.latency_us),
            Link(link_gbps / bench.ranks_per_node, rates.latency_us),
        ),
        provenance={},
    )


def predicted_ms(bench: LabBench, machine: Machine, works: dict[str, list[Work]]) -> dict[str, float]:
    """Of each method: the time of its slowest group of ranks, forward and backward."""
    return {method: max(_ms(bench, machine, work) for work in each) for method, each in works.items()}


def _ms(bench: LabBench, machine: Machine, work: Work) -> float:
    found = simulate(
        work.plan,
        cluster=machine,
        methods=[f"plan+{work.exchange}"],
        query_heads=bench.query_heads,
        kv_heads=bench.kv_heads,
        head_dim=bench.head_dim,
        dtype_bytes=bench.shape.dtype_bytes,
    )
    return found.methods[0].module_ms


def _tflops(machine: Machine, bench: LabBench) -> float:
    """What the rate would be on a core of its own."""
    alone = simulate(
        RATED,
        1,
        cluster=machine,
        methods=["flashcp"],
        query_heads=bench.query_heads,
        kv_heads=bench.kv_heads,
        head_dim=bench.head_dim,
        dtype_bytes=bench.shape.dtype_bytes,
    )
    return operations(RATED, bench) / (1e9 * alone.methods[0].attention_ms)


def operations(lengths: Sequence[int], bench: LabBench) -> float:
    """Attention operations of a pack, forward and backward."""
    rows = np.asarray(lengths, dtype=np.float64)
    pairs = float((rows * (rows + 1) / 2).sum())
    return (FORWARD_FLOPS + BACKWARD_FLOPS) * pairs * bench.query_heads * bench.head_dim


def _slowed(costs: Costs, share: float) -> Costs:
    """Rates times a share, times over it."""
    changed = {}
    for field in fields(costs):  # type: ignore[arg-type]
        value = getattr(costs, field.name)
        if field.name.endswith("_us"):
            changed[field.name] = value / share
        elif field.name.endswith(("tflops", "gbps")):
            changed[field.name] = value * share
    return replace(costs, **changed)  # type: ignore[type-var]
