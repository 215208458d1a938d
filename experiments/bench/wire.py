"""What the wire of gradients costs: errors of dK and dV over both, next to float64.

`python -m flashcp.experiments.bench.wire`. The operator itself, on a CPU; its ranks are threads of one process that put
rows into each other's memory. `rounding` is the error of the float64 gradient rounded to the model's dtype: the least
that any gradient in it has. Needs no hydra.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import flashcp
from flashcp.comm.choice import Connection
from flashcp.comm.fabrics.memory import virtual_memories
from flashcp.comm.fabrics.shm import ShmFabric
from flashcp.comm.heap import SymmetricHeap
from flashcp.comm.one_sided import OneSided
from flashcp.context_parallel import ContextParallel
from flashcp.experiments.bench.harness import exact_results, provenance, relative_error
from flashcp.experiments.cli import bar
from flashcp.experiments.sweep.results import Number, Row, to_row, write_rows
from flashcp.sharding.lengths import windows

TOKENS = 2048
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
RANKS = [(2, 1), (3, 1), (4, 1), (6, 1), (16, 1), (1, 4), (4, 4)]
"""Holders, and head ranks of each: 4 share 2 KV heads, so each gradient of K and V is a sum of two ranks'."""
WIRES = ("model", "fp32")
EXCHANGES = ("exact", "ring")
"""Blocks of `all_gather` and `compacted` bring the same numbers home as `exact` does; `ulysses` sends whole ones."""
TIMEOUT_S = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write rows. Returns 0."""
    parser = argparse.ArgumentParser(prog="bench_wire", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/wire"))
    out = parser.parse_args(arguments).out
    torch.set_num_threads(1)
    rows = list(measure(lengths(TOKENS), RANKS))
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out, rows)
    print(f"wrote {out}", file=sys.stderr)
    return 0


def lengths(tokens: int) -> dict[str, list[int]]:
    """Documents by name: one, sampled ones, and many equal ones."""
    sampled = next(windows("redpajama", tokens, 1, seed=0)).tolist()
    return {"one document": [tokens], "redpajama": sampled, "16 equal": [tokens // 16] * 16}


def measure(documents: dict[str, list[int]], ranks: Sequence[tuple[int, int]]) -> Iterator[Row]:
    """dk_error, dv_error: ||found - float64|| / ||float64||. Providers are exchange/wire, and `rounding`."""
    device, versions, *_ = provenance()
    for (name, found), (dtype, kind) in bar([*itertools.product(documents.items(), DTYPES.items())], unit="case"):
        random = torch.Generator().manual_seed(0)
        whole = [torch.randn(sum(found), n, HEAD_DIM, generator=random) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
        q, k, v, grad = (x.to(kind) for x in whole)
        exact = exact_results((q, k, v), grad, found)[2:]  # of k and v

        def errors(
            case: str, provider: str, gradients: Sequence[Tensor], exact: Sequence[Tensor] = exact
        ) -> Iterator[Row]:
            for metric, one, other in zip(("dk_error", "dv_error"), gradients, exact, strict=True):
                number = Number(provider, metric, "ratio", None, relative_error(one, other), None)
                yield to_row(case, number, device, of_versions=f"{versions}, torch {torch.__version__}")

        yield from errors(f"{name} {dtype}", "rounding", [x.to(kind) for x in exact])
        for (holders, heads), exchange, wire in itertools.product(ranks, EXCHANGES, (*WIRES, "auto")):
            # Elsewhere `auto` is one of the others, and one holder has nobody to exchange with.
            if (heads > 1 or wire != "auto") and (holders > 1 or exchange == "exact"):
                case = f"{name} {dtype} R={holders} h={heads}"
                gradients = both_ways(found, holders, heads, exchange, wire, [q, k, v, grad])
                yield from errors(case, f"{exchange}/{wire}", gradients[1:])


def both_ways(
    documents: Sequence[int], holders: int, head_ranks: int, exchange: str, wire: str, whole: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of q, k and v of a pack, [tokens, heads, D], from all ranks, each document cut over all holders.

    whole: q, k, v and the gradient of the output.
    """
    plan = flashcp.plan(documents, holders, "per_document")
    ranks = operators(holders, head_ranks, exchange, wire)

    def attend(cp: ContextParallel) -> tuple[Tensor, ...]:
        *leaves, grad = (cp.shard(x, plan) for x in whole)
        q, k, v = (x.requires_grad_() for x in leaves)
        return torch.autograd.grad(cp.attention(q, k, v, plan), (q, k, v), grad)

    with ThreadPoolExecutor(len(ranks)) as threads:
        parts = [*threads.map(attend, ranks)]
    order = torch.from_numpy(np.argsort(np.concatenate([plan.rows(holder) for holder in range(holders)])))
    return [torch.cat(rows)[order] for rows in zip(*parts, strict=True)]


def operators(holders: int, head_ranks: int, exchange: str, wire: str) -> list[ContextParallel]:
    """Of all ranks, for a thread each and one call."""
    inside = [_transports(head_ranks) if head_ranks > 1 else [None] for _ in range(holders)]
    between = [_transports(holders) for _ in range(head_ranks)]
    joined = [
        Connection(between[member][holder], None, "ranks of one process", inside[holder][member])
        for holder in range(holders)
        for member in range(head_ranks)
    ]
    return [ContextParallel(one, exchange, gradient_wire=wire) for one in joined]


def _transports(ranks: int) -> list[OneSided]:
    arrays, lock = virtual_memories(ranks, lambda size: np.zeros(size, dtype=np.uint8)), threading.Lock()

    def memories(index: int, size: int) -> list[np.ndarray]:
        with lock:
            return arrays(index, size)

    fabrics = [ShmFabric(rank, ranks, memories, TIMEOUT_S) for rank in range(ranks)]
    return [OneSided(fabric, SymmetricHeap(fabric, lambda: 0, lambda: None)) for fabric in fabrics]


if __name__ == "__main__":
    sys.exit(main())
