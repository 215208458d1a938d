"""The link between ranks: free, or slowed until bytes per attention operation are those of a cluster across nodes.

Ranks of one machine pay next to nothing for traffic. A slowed link shows what traffic costs where it has a price: the
rate is the cluster's, scaled by what this machine computes over what the cluster computes. Rows of K and V and their
gradients are slowed; latency, headers and the sum of weight gradients, the same for all methods, are not.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashcp.clusters import clusters, read_cluster
from flashcp.simulator.cost import BACKWARD_FLOPS, FORWARD_FLOPS

__all__ = ["FREE", "SlowedLink", "check_link", "cluster_rates"]

FREE = "free"
"""Rows leave at once."""


@dataclass(frozen=True)
class SlowedLink:
    """A rank's link, and what it was scaled by.

    cluster: whose link it stands for. network_gbps: GB/s of one of its ranks across nodes. cluster_tflops: 10^12
    attention operations a second of one of its ranks, forward and backward together. here_tflops: the same of the
    slowest rank here, measured.
    """

    cluster: str
    network_gbps: float
    cluster_tflops: float
    here_tflops: float

    @property
    def gbps(self) -> float:
        """GB/s at which rows leave."""
        return self.network_gbps * self.here_tflops / self.cluster_tflops

    def __str__(self) -> str:
        return (
            f"rows leave at {self.gbps:.3g} GB/s, the {self.network_gbps:g} GB/s of a rank of {self.cluster} across "
            f"nodes x {self.here_tflops:.3g} TFLOP/s of attention measured here / {self.cluster_tflops:.4g} there"
        )


def check_link(name: str) -> None:
    """Raise ValueError for a link that is neither free nor a cluster's."""
    if name != FREE and name not in clusters():
        raise ValueError(f"parallel.link={name!r}: expected one of {FREE}, {', '.join(clusters())}")


def cluster_rates(name: str) -> tuple[float, float]:
    """Of a rank of `conf/cluster/NAME.yaml`: GB/s across nodes, and 10^12 attention operations a second, forward and
    backward together."""
    machine = read_cluster(name)
    forward, backward = machine.attention.forward.tflops, machine.attention.backward.tflops
    return machine.links.network.gbps, (FORWARD_FLOPS + BACKWARD_FLOPS) / (
        FORWARD_FLOPS / forward + BACKWARD_FLOPS / backward
    )
