"""The link between ranks: free, or slowed until bytes per attention operation are those of a cluster across nodes.

Ranks of one machine pay next to nothing for traffic. A slowed link shows what traffic costs where it has a price: the
rate is the cluster's, scaled by what this machine computes over what the cluster computes. Rows of K and V and their
gradients are slowed; latency, headers and the sum of weight gradients, the same for all methods, are not.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import flashcp
from flashcp.clusters import read_cluster
from flashcp.simulator.cost import BACKWARD_FLOPS, FORWARD_FLOPS
from flashcp.train.config import TrainConfig
from flashcp.train.data.documents import read_documents
from flashcp.train.data.sources import Source
from flashcp.train.data.tokenizer import Tokenizer
from flashcp.train.data.windows import pack_documents
from flashcp.train.parallel import FREE
from flashcp.train.ranks import Ranks

REPEATS = 5


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


def cluster_rates(name: str) -> tuple[float, float]:
    """Of a rank of `conf/cluster/NAME.yaml`: GB/s across nodes, and 10^12 attention operations a second, forward and
    backward together."""
    machine = read_cluster(name)
    forward, backward = machine.attention.forward.tflops, machine.attention.backward.tflops
    return machine.links.network.gbps, (FORWARD_FLOPS + BACKWARD_FLOPS) / (
        FORWARD_FLOPS / forward + BACKWARD_FLOPS / backward
    )


def slowed_link(config: TrainConfig, source: Source, tokenizer: Tokenizer, ranks: Ranks) -> SlowedLink | None:
    """The link that `parallel.link` names, scaled by attention on the run's first pack; None where it is free, and for
    one rank alone. All ranks call this together."""
    parallel, model, data = config.parallel, config.model, config.data
    if parallel.link == FREE or ranks.world_size == 1:
        return None
    documents = read_documents(source, data.epochs, on_bad_record=data.on_bad_record)
    window = next(pack_documents(documents, tokenizer, config.context, data.overflow, longest=data.longest), None)
    if window is None:
        raise ValueError(f"data.epochs={data.epochs}: the documents fill no window of context={config.context}")
    here = measured_tflops(
        window.document_lengths.tolist(),
        (model.heads, model.kv_heads, model.dim // model.heads),
        ranks,
        config.loop.dtype,
        attention=parallel.attention,
        tuning=parallel.tuning.read(),
    )
    link = SlowedLink(parallel.link, *cluster_rates(parallel.link), here)
    if ranks.rank == 0:
        print(f"emulated: {link}", file=sys.stderr, flush=True)
    return link


def measured_tflops(
    document_lengths: Sequence[int],
    heads: tuple[int, int, int],
    ranks: Ranks,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> float:
    """10^12 attention operations a second of the slowest rank, while all compute: one layer over a pack, forward and
    backward, the median of a few. All ranks call this together.

    heads: query heads, KV heads, head_dim. options: of `flashcp.varlen_attention`.
    """
    query_heads, kv_heads, head_dim = heads
    tokens = sum(document_lengths)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(tokens, count, head_dim, generator=generator).to(ranks.device, dtype).requires_grad_()
        for count in (query_heads, kv_heads, kv_heads)
    )

    def seconds() -> float:
        ranks.barrier()
        started = time.perf_counter()
        flashcp.varlen_attention(q, k, v, document_lengths, **options).sum().backward()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
        return time.perf_counter() - started

    seconds()  # warms up
    (slowest,) = ranks.max(statistics.median(seconds() for _ in range(REPEATS)))
    return 1e-12 * attention_operations(document_lengths, query_heads, head_dim) / slowest


def attention_operations(document_lengths: Sequence[int], query_heads: int, head_dim: int) -> float:
    """Useful operations of a layer over a pack, forward and backward."""
    pairs = sum(length * (length + 1) / 2 for length in document_lengths)
    return (FORWARD_FLOPS + BACKWARD_FLOPS) * pairs * query_heads * head_dim
