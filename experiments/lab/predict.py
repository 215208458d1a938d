"""What is known of a lab before it runs: how fast its kernels are, what its links carry, and what the simulator makes
of these alone, each method's time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import torch

from flashcp.clusters import read_cluster
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.experiments.bench.calibrate import attention_us, copy_cost, random_schedule
from flashcp.experiments.bench.calibration import fit_attention
from flashcp.experiments.bench.kernel_times import KernelTimer
from flashcp.experiments.lab.cases import RATED, LabBench, Work, moved_bytes
from flashcp.experiments.lab.nodes import Link as NodeLink
from flashcp.sharding.holders import members_heads
from flashcp.simulation import simulate
from flashcp.simulator.cost import AttentionShape, Link, Links
from flashcp.simulator.machine import Machine
from flashcp.simulator.members import member_shape
from flashcp.train.link import attention_operations, cluster_rates
from flashcp.train.parallel import FREE

Costs = TypeVar("Costs")
OPEN = NodeLink(50.0)
"""A link that holds nothing back here."""
DTYPE_BYTES = 2
"""Of a number on the cluster that is emulated; the lab's numbers are fp32."""
REST = "this_machine"
"""The cluster file of what is not timed: no module's time depends on it."""
SCHEDULES = 64
REPEATS = 3
DIVISORS = (4, 2, 1)
"""Of the lab's context and of its ranks, for the random packs and plans."""


@dataclass(frozen=True)
class Rates:
    """What was measured in a lab before it runs.

    tflops: 10^12 attention operations a second of the slowest rank, all at once, forward and backward. latency_us: of
    an exchange of one row a rank, one pass of the operator. node_gbps: GB/s between two ranks of a node. socket_gbps:
    GB/s that a rank sends and receives, added up, when all do and nothing holds them back but their cores.
    """

    tflops: float
    latency_us: float
    node_gbps: float
    socket_gbps: float


@dataclass(frozen=True)
class Scale:
    """link_gbps: GB/s of a node's link."""

    bench: LabBench
    rates: Rates
    link_gbps: float

    @classmethod
    def of(cls, bench: LabBench, rates: Rates) -> Scale:
        """Raises ValueError where no link of the lab can carry what this comes to."""
        if bench.link == FREE:
            return cls(bench, rates, OPEN.gbps)
        gbps, tflops = cluster_rates(bench.link)
        wider = bench.shape.dtype_bytes / DTYPE_BYTES
        shares = bench.link_share * bench.ranks_per_node
        scale = cls(bench, rates, gbps * rates.tflops / tflops * bench.shrink * wider * shares)
        try:
            NodeLink(scale.link_gbps)
        except ValueError as error:
            told = f"link_share={bench.link_share:g} with shrink={bench.shrink}"
            raise ValueError(f"{told}: {error} for {scale}") from error
        return scale

    def __str__(self) -> str:
        if self.bench.link == FREE:
            return f"free links, {self.rates.tflops:.3g} TFLOP/s of attention a rank"
        gbps, tflops = cluster_rates(self.bench.link)
        share = "" if self.bench.link_share == 1 else f" x {self.bench.link_share:g}"
        return (
            f"a node's link carries {1e3 * self.link_gbps:.3g} MB/s = {gbps:g} GB/s of a rank of {self.bench.link} x "
            f"{self.rates.tflops:.3g} TFLOP/s of attention measured here / {tflops:.4g} there x "
            f"{self.bench.ranks_per_node} ranks x {self.bench.shrink} for shorter windows x "
            f"{self.bench.shape.dtype_bytes / DTYPE_BYTES:g} for fp32{share}"
        )


# --- a core of its own


def time_kernels(bench: LabBench) -> Machine:
    """A machine of one core: its attention at the heads that the lab's ranks have, fitted to random ranks' schedules of
    random packs, and its copies. Its links mean nothing here.

    Raises RuntimeError where attention differs from the reference, ValueError where times grow with nothing.
    """
    random = np.random.default_rng(bench.seed)
    contexts = [max(2 * bench.world_size, bench.context // part) for part in DIVISORS]
    sizes = sorted({max(1, bench.world_size // part) for part in DIVISORS})
    heads = shapes_of(bench)
    with _one_thread():
        timer = KernelTimer(torch.device("cpu"), REPEATS)
        timer.check(bench.shape)
        schedules = [random_schedule(contexts, sizes, random) for _ in range(SCHEDULES)]
        shapes = [heads[index % len(heads)] for index in range(SCHEDULES)]
        times = attention_us(timer, schedules, shapes)
        attention, _ = fit_attention(schedules, shapes, times, SCHEDULES)
        copies = copy_cost(bench.shape, REPEATS, timer.device)
    return replace(read_cluster(REST), name="lab", attention=attention, copies=copies, provenance={})


def shapes_of(bench: LabBench) -> list[AttentionShape]:
    """The heads on which ranks compute under the lab's methods, most first."""
    whole, found = bench.shape, set()
    for works in bench.work(bench.batches[0]).values():
        for work in works:
            split = work.ranks if EXCHANGE_CLASSES[work.exchange].splits_heads else work.head_ranks
            found.add(members_heads(whole.query_heads, whole.kv_heads, split))
    return [whole._replace(query_heads=query, kv_heads=kv) for query, kv in sorted(found, reverse=True)]


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch computes on one, as in a rank."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- the simulator


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
    found = simulate(
        work.plan,
        cluster=machine,
        methods=[f"plan+{work.exchange}"],
        head_ranks=work.head_ranks,
        **scale.bench.shape._asdict(),
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
    alone = simulate(RATED, 1, cluster=machine, methods=["flashcp"], **bench.shape._asdict())
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
