"""How fast this machine computes attention, and the link that is slowed to match."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

import flashcp
from flashcp.simulator.cost import BACKWARD_FLOPS, FORWARD_FLOPS
from flashcp.train.config import TrainConfig
from flashcp.train.data.documents import read_documents
from flashcp.train.data.sources import Source
from flashcp.train.data.tokenizer import Tokenizer
from flashcp.train.data.windows import pack_documents
from flashcp.train.link import FREE, SlowedLink, cluster_rates
from flashcp.train.ranks import Ranks

__all__ = ["measured_tflops", "slowed_link"]

REPEATS = 5


def slowed_link(config: TrainConfig, source: Source, tokenizer: Tokenizer, ranks: Ranks) -> SlowedLink | None:
    """The link that `parallel.link` names, scaled by attention on the run's first pack; None where it is free, and for
    one rank alone. All ranks call this together."""
    parallel, model, data = config.parallel, config.model, config.data
    if parallel.link == FREE or ranks.world_size == 1:
        return None
    documents = read_documents(source, data.epochs)
    window = next(pack_documents(documents, tokenizer, config.context, data.overflow, longest=data.longest), None)
    if window is None:
        raise ValueError(f"data.epochs={data.epochs}: the documents fill no window of context={config.context}")
    here = measured_tflops(
        window.document_lengths.tolist(),
        (model.heads, model.kv_heads, model.dim // model.heads),
        ranks,
        torch.float32 if config.loop.precision == "fp32" else torch.bfloat16,
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
    pairs = sum(length * (length + 1) / 2 for length in document_lengths)
    return 1e-12 * (FORWARD_FLOPS + BACKWARD_FLOPS) * pairs * query_heads * head_dim / slowest
