"""How long rows take from rank to rank, within a rank's memory, and through a layer: measured here."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from flashcp.context_parallel import ContextParallel
from flashcp.experiments.bench.exchange_times import in_turns, moving, ranks_max
from flashcp.experiments.bench.kernel_times import DTYPES
from flashcp.experiments.bench.timing import Clock, median_us
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.strategies import plan
from flashcp.simulator.cost import AttentionShape, layer_flops
from flashcp.train.model import Block, ModelConfig, Rotary
from flashcp.train.ranks import Ranks

__all__ = ["copy_us", "layer_tflops", "link_us"]

TIMEOUT_S = 120.0
ROUNDS = 20  # of each repeat: messages are short, and two processes' turns vary
HEAD_DIM = 16


def copy_us(sizes: Sequence[int], row_bytes: int, repeats: int, device: torch.device, clock: Clock) -> list[float]:
    """Time to gather `sizes` bytes, whole rows each, by an index, as rows are packed before they leave."""
    times = []
    for size in sizes:
        rows = size // row_bytes
        memory = torch.randn(rows, row_bytes // 4, device=device)
        index = torch.randperm(rows, device=device)
        times.append(median_us(lambda memory=memory, index=index: memory[index], repeats, device, clock))  # type: ignore[misc]
    return times


def layer_tflops(shape: AttentionShape, rows: int, repeats: int, device: torch.device, clock: Clock) -> float:
    """10^12 operations of matrix products a second that a decoder layer reaches, all but its attention counted in."""
    dim = shape.query_heads * shape.head_dim
    model = ModelConfig(dim=dim, heads=shape.query_heads, kv_heads=shape.kv_heads)
    dtype = DTYPES[shape.dtype_bytes]
    block = Block(model, _NoAttention()).to(device, dtype)
    x = torch.randn(rows, dim, device=device, dtype=dtype, requires_grad=True)
    rotary = Rotary(shape.head_dim, model.rope_theta).to(device)(torch.arange(rows, device=device))
    one = plan([rows], 1)
    us = median_us(lambda: block(x, rotary, one).backward(x.detach()), repeats, device, clock)
    return layer_flops(shape, 0, rows) / (1e6 * us)


class _NoAttention:
    """Leaves queries as they are: what a layer takes without its attention."""

    def prefetch(self, k: Tensor, v: Tensor, plan: ShardingPlan) -> _NoAttention:
        """Both are part of the output, so that their gradients are computed."""
        self._share = (k.sum() + v.sum()) * 0
        return self

    def attention(self, q: Tensor) -> Tensor:
        """As they came."""
        return q + self._share


def link_us(sizes: Sequence[int], repeats: int, cuda: bool) -> list[float]:
    """Time until each of two ranks of this machine has `sizes` bytes of K and V of the other, as an exchange moves
    them: over shared memory, or NCCL on two GPUs."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        there, here = context.Pipe()
        arguments = (str(Path(folder) / "store"), tuple(sizes), repeats, cuda)
        ranks = [context.Process(target=_rank, args=(rank, *arguments, there), daemon=True) for rank in range(2)]
        for rank in ranks:
            rank.start()
        try:
            while not here.poll(0.1):
                if not all(rank.is_alive() for rank in ranks):
                    raise RuntimeError("one of two ranks of this machine ended before it had measured the link")
            times: list[float] = here.recv()
        finally:
            for rank in ranks:
                rank.join(5)
                rank.kill()
    return times


def _rank(rank: int, store: str, sizes: Sequence[int], repeats: int, cuda: bool, answer: Connection) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=TIMEOUT_S)
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    cp = ContextParallel(exchange="all_gather", timeout_s=TIMEOUT_S)
    work = {size: moving(cp, *_block(size, device)) for size in sizes}
    ranks = Ranks(rank, 2, device)
    times = in_turns(work, ranks, rounds=ROUNDS * repeats)
    medians = [1e3 * float(np.median(ranks_max(ranks, times[size]))) for size in sizes]
    if rank == 0:
        answer.send(medians)
    dist.barrier()
    dist.destroy_process_group()


def _block(size: int, device: torch.device) -> tuple[ShardingPlan, Tensor, Tensor]:
    """One document in two halves, and a rank's K and V of it: `size` bytes together."""
    rows = max(1, size // (2 * 4 * HEAD_DIM))
    halves = ShardingPlan.from_shards([2 * rows], 2, [(0, 0, rows, 0), (0, rows, 2 * rows, 1)])
    k, v = (torch.zeros(rows, 1, HEAD_DIM, device=device) for _ in range(2))
    return halves, k, v
