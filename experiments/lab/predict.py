"""What the simulator says of a lab before the lab runs: each method's time, from its rates and its links alone."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TypeVar

from flashcp.experiments.lab.cases import LabBench, Work
from flashcp.experiments.lab.crossing import moved_bytes
from flashcp.experiments.lab.scale import RATED, Scale
from flashcp.simulation import simulate
from flashcp.simulator.cost import Link, Links
from flashcp.simulator.machine import Machine
from flashcp.simulator.members import member_shape
from flashcp.train.link import attention_operations

Costs = TypeVar("Costs")


def lab_machine(scale: Scale, whole: Machine) -> Machine:
    """The lab as the simulator knows machines.

    whole: its kernels on a core of their own. A rank has a share of one, so all are slower by one factor.
    """
    bench, rates = scale.bench, scale.rates
    share = rates.tflops / _tflops(whole, bench)
    attention = whole.attention
    return replace(
        whole,
        attention=replace(
            attention, forward=_slowed(attention.forward, share), backward=_slowed(attention.backward, share)
        ),
        copies=_slowed(whole.copies, share),
        gemm_tflops=share * whole.gemm_tflops,
        links=Links(
            bench.ranks_per_node,
            Link(rates.node_gbps, rates.latency_us),
            Link(scale.link_gbps, rates.latency_us),
            shared_port=True,
        ),
    )


def predict(scale: Scale, machine: Machine) -> dict[str, list[float]]:
    """Milliseconds of each method, batch by batch: of its slowest group of ranks, forward and backward."""
    works = [scale.bench.work(batch) for batch in scale.bench.batches]
    return {method: [max(_ms(scale, machine, one) for one in each[method]) for each in works] for method in works[0]}


def _ms(scale: Scale, machine: Machine, work: Work) -> float:
    """What the simulator says, but no less than the core of the busiest rank has to do: GPUs send and receive beside
    their kernels, ranks here have one core for both."""
    bench = scale.bench
    found = simulate(
        work.plan,
        cluster=machine,
        methods=[f"plan+{work.exchange}"],
        head_ranks=work.head_ranks,
        query_heads=bench.query_heads,
        kv_heads=bench.kv_heads,
        head_dim=bench.head_dim,
        dtype_bytes=bench.shape.dtype_bytes,
    )
    one = found.methods[0]
    return max(one.module_ms, one.attention_ms + one.copies_ms + _sockets_ms(scale, work))


def _sockets_ms(scale: Scale, work: Work) -> float:
    """Of the rank that sends and receives most. None where all share a node: they use its memory."""
    if work.ranks <= scale.bench.ranks_per_node:
        return 0.0
    moved = moved_bytes(work.plan, work.exchange, member_shape(scale.bench.shape, work.head_ranks))
    return float((moved.sum(axis=0) + moved.sum(axis=1)).max()) / (1e6 * scale.rates.socket_gbps)


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
    return attention_operations(RATED, bench.query_heads, bench.head_dim) / (1e9 * alone.methods[0].attention_ms)


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
