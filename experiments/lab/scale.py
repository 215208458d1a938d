"""What makes the lab's links those of a cluster: as many bytes an operation as between its nodes."""

from __future__ import annotations

from dataclasses import dataclass

from flashcp.experiments.lab.cases import LabBench
from flashcp.experiments.lab.nodes import Link
from flashcp.train.link import cluster_rates
from flashcp.train.parallel import FREE

RATED = (2048, 1024, 512, 256, 128, 64, 64)
"""Documents that the rate of attention is measured on."""
OPEN = Link(50.0)
"""A link that holds nothing back here."""
DTYPE_BYTES = 2
"""Of a number on the cluster that is emulated; the lab's numbers are fp32."""


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
            Link(scale.link_gbps)
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
