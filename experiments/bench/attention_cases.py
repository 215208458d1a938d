"""What the attention benchmark runs on: packs on one device, the shares of a pack that plans give to one rank, and the
exact result of either."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from flashcp.experiments.bench.kernel_times import rank_schedule
from flashcp.kernels.schedule import Schedule, whole_pack_schedule
from flashcp.sharding.lengths import LENGTH_DATA, windows
from flashcp.sharding.plan import ShardingPlan
from flashcp.sharding.strategies import plan
from flashcp.simulator.cost import FORWARD_FLOPS

OURS = "flashcp"
CONTEXT = 131_072
FIRST = ("one_16k", "pile", "16x8k", "wlb_llm", "one_4k", "one_32k", "rank_of_8_per_document", "redpajama")
"""What the published numbers are about; the other cases follow, and grouped heads after both."""
HEADS = ((32, 32), (32, 8))
HEAD_DIM = 128
SEED = 0


@dataclass(frozen=True)
class Case:
    """Work for attention. lengths: of the documents of a whole pack, None where it is one rank's share of a plan."""

    name: str
    schedule: Schedule
    rows: int
    received_rows: int
    lengths: tuple[int, ...] | None
    query_heads: int
    kv_heads: int
    head_dim: int = HEAD_DIM

    @property
    def label(self) -> str:
        """The name of a case among those of other head counts."""
        return f"{self.name}_{self.query_heads}x{self.kv_heads}"

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a KV head."""
        return self.query_heads != self.kv_heads

    @property
    def forward_flops(self) -> int:
        """Useful ones: causal pairs x 4 x heads x head_dim; the backward counts 2.5 times as many."""
        return self.schedule.pairs * FORWARD_FLOPS * self.query_heads * self.head_dim


@dataclass(frozen=True)
class Tensors:
    """Inputs of a case: q, k, v [rows, heads, head_dim], received [R, 2, kv_heads, head_dim], the output's gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    received: Tensor
    grad: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What gradients are asked for."""
        return (self.q, self.k, self.v, *([self.received] if len(self.received) else []))


def all_cases() -> Iterator[Case]:
    """Every case with 32:32 and 32:8 heads, the small ones first."""
    packs: dict[str, list[int]] = {f"one_{n // 1024}k": [n] for n in (4096, 16_384, 32_768, CONTEXT)}
    packs["16x8k"] = [8192] * 16
    packs["1024x128"], packs["4096x32"] = [128] * 1024, [32] * 4096
    for data in LENGTH_DATA:
        packs[data] = next(windows(data, CONTEXT, 1, SEED)).tolist()
    for heads in HEADS:
        for name, lengths in packs.items():
            yield pack(name, lengths, heads)
        for strategy in ("per_sequence", "per_document", "flashcp_paper"):
            split = plan(packs["wlb_llm"], 8, strategy)
            busiest = share(f"rank_of_8_{strategy}", split, int(split.work.argmax()), heads)
            yield busiest
            yield pack(f"as_one_document_{busiest.name}", [int(math.sqrt(2 * busiest.schedule.pairs))], heads)


@cache
def cases_by_value(small: bool) -> dict[str, Case]:
    """Every case by its label, what the published numbers are about first; in small a tiny one."""
    if small:
        tiny = pack("tiny", (60, 1, 300, 129, 20), (4, 2), 16)
        return {tiny.label: tiny}
    found = {case.label: case for case in all_cases()}

    def value(case: Case) -> tuple[bool, int]:
        return case.grouped, FIRST.index(case.name) if case.name in FIRST else len(FIRST)

    return {case.label: case for case in sorted(found.values(), key=value)}


def pack(name: str, lengths: Sequence[int], heads: tuple[int, int], head_dim: int = HEAD_DIM) -> Case:
    """A whole pack on one device. heads: of queries and of KV."""
    schedule = whole_pack_schedule(np.array(lengths))
    return Case(name, schedule, sum(lengths), 0, tuple(lengths), *heads, head_dim)


def share(name: str, split: ShardingPlan, rank: int, heads: tuple[int, int], head_dim: int = HEAD_DIM) -> Case:
    """What a plan gives to one rank, its KV exchanged exactly."""
    one = rank_schedule(split, rank)
    assert one is not None  # every rank reads its own rows
    return Case(name, one.schedule, one.query_rows, one.received_rows, None, *heads, head_dim)


def make_tensors(case: Case, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Random inputs of a case, asking for gradients."""
    random = torch.Generator(device=device).manual_seed(SEED)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device, dtype=dtype)

    queries, keys = (case.query_heads, case.head_dim), (case.kv_heads, case.head_dim)
    q, k, v = draw(case.rows, *queries), draw(case.rows, *keys), draw(case.rows, *keys)
    received = draw(case.received_rows, 2, *keys)
    for x in (q, k, v, received):
        x.requires_grad_()
    return Tensors(q, k, v, received, draw(case.rows, *queries))


def exact_share(case: Case, tensors: Tensors, kv_head: int, block: int = 1024) -> dict[str, Tensor]:
    """Output and gradients of one KV head and its query heads in float64, straight from the schedule's ranges.

    Returns out and q [rows, group, head_dim], k and v [rows, head_dim], received [R, 2, head_dim].
    """
    s, group, scale = case.schedule, case.query_heads // case.kv_heads, case.head_dim**-0.5
    heads = slice(kv_head * group, (kv_head + 1) * group)
    q, grad = (x[:, heads].detach().double() for x in (tensors.q, tensors.grad))
    local = torch.stack((tensors.k[:, kv_head], tensors.v[:, kv_head]), 1).detach().double()
    buffers = local, tensors.received[:, :, kv_head].detach().double()
    out, grad_q = torch.zeros_like(q), torch.zeros_like(q)
    grads = tuple(torch.zeros_like(x) for x in buffers)
    for g in range(len(s.query_start)):
        ranges = range(int(s.range_first[g]), int(s.range_first[g + 1]))
        ordered = sorted(ranges, key=lambda r: s.position[r])
        pieces = [(int(s.received[r]), slice(int(s.row_start[r]), int(s.row_stop[r]))) for r in ordered]
        k, v = torch.cat([buffers[place][rows] for place, rows in pieces]).unbind(1)
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        first, start, stop = int(s.query_position[g]), int(s.query_start[g]), int(s.query_stop[g])
        for a in range(start, stop, block):
            rows = slice(a, min(a + block, stop))
            seen = first + rows.stop - start  # keys up to the last query of the block
            position = torch.arange(first + a - start, seen, device=q.device)
            future = torch.arange(seen, device=q.device) > position[:, None]
            scores = torch.einsum("qgd,kd->gqk", q[rows], k[:seen]).mul_(scale).masked_fill_(future, -torch.inf)
            weights = scores.softmax(-1)
            out[rows] = torch.einsum("gqk,kd->qgd", weights, v[:seen])
            grad_v[:seen] += torch.einsum("gqk,qgd->kd", weights, grad[rows])
            delta = (grad[rows] * out[rows]).sum(-1).T[..., None]
            pull = torch.einsum("qgd,kd->gqk", grad[rows], v[:seen]).sub_(delta).mul_(weights).mul_(scale)
            grad_q[rows] = torch.einsum("gqk,kd->qgd", pull, k[:seen])
            grad_k[:seen] += torch.einsum("gqk,qgd->kd", pull, q[rows])
        sizes = [rows.stop - rows.start for _, rows in pieces]
        both = torch.stack((grad_k, grad_v), 1).split(sizes)
        for (place, rows), part in zip(pieces, both, strict=True):
            grads[place][rows] += part
    return {"out": out, "q": grad_q, "k": grads[0][:, 0], "v": grads[0][:, 1], "received": grads[1]}
