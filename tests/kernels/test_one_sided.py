"""Attention that waits for rows, between processes that share memory, under the interpreter.

Rows that have not arrived are NaN, and every test sends them late: who does not wait gets NaN.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import flashcp
from flashcp.kernels.interface import KV, WaitFlags
from flashcp.kernels.schedule import build_schedule
from flashcp.kernels.selection import select_attention
from flashcp.kernels.tuning import Tuning
from flashcp.sharding.documents import expand_ranges
from flashcp.sharding.plan import Segments, ShardingPlan
from tests.interpreter import interpreted, interpreted_together
from tests.packs import random_lengths, random_qkv, relative_error

triton = pytest.importorskip("triton")

from flashcp.kernels import one_sided  # noqa: E402
from flashcp.kernels.pack import pack_rows  # noqa: E402

CPU = torch.device("cpu")
CAME, BEGUN, REGION = 0, 64, 128  # bytes into a heap: flags for two purposes, then rows
PATIENCE_S = 30.0


class Heap:
    """The memory of a rank that reads, in a file that several processes map."""

    def __init__(self, file: Path, sources: int, rows: int, width: int) -> None:
        self.bytes = torch.from_file(str(file), shared=True, size=REGION + 4 * rows * width, dtype=torch.uint8)
        self.sources, self.width = sources, width
        self.stuck = torch.zeros(1, dtype=torch.int32)

    def flags(self, which: int) -> Tensor:
        """The flags for a purpose, one a source."""
        return self.bytes[which : which + 4 * self.sources].view(torch.int32)

    def rows(self) -> Tensor:
        """The region as fp32 [rows, width]."""
        return self.bytes[REGION:].view(torch.float32).view(-1, self.width)

    def wait_flags(self, epoch: int, timeout_s: float = PATIENCE_S) -> WaitFlags:
        return WaitFlags(self.flags(CAME), epoch, self.stuck, timeout_s)


def poisoned(folder: Path, sources: int, rows: int, width: int) -> tuple[Path, int, int, int]:
    """A fresh heap whose rows are NaN; what `Heap` takes."""
    shape = folder / "heap", sources, rows, width
    Heap(*shape).rows().fill_(torch.nan)
    return shape


def late(*shape: Any) -> dict[str, Any]:
    """What a kernel that waits for one flag finds, and how long it takes, when nobody raises it."""
    heap, found = Heap(*shape), dict[str, Any]()
    one_sided.spins(CPU, 1.0)  # measured before

    def wait(name: str, source: int, epoch: int, timeout_s: float = PATIENCE_S) -> None:
        start = time.perf_counter()
        looks = one_sided.spins(CPU, timeout_s)
        _wait_for[(1,)](heap.flags(CAME), source, epoch, looks, heap.stuck)
        found[name] = time.perf_counter() - start, heap.stuck.item()

    heap.flags(CAME)[:] = torch.tensor([0, 7, 6, 7])
    wait("higher", 1, 6)
    wait("late", 2, 7, timeout_s=0.5)
    wait("again", 1, 8)
    return found


@triton.jit(do_not_specialize=["source", "epoch", "spins"])
def _wait_for(flags, source, epoch, spins, stuck):
    one_sided.wait_until(flags + source, epoch, spins, stuck, source)


def test_a_wait_for_what_never_comes_ends_and_names_the_source(tmp_path: Path) -> None:
    found = interpreted(late, *poisoned(tmp_path, 4, 40, 16))
    assert found["higher"] == (pytest.approx(0, abs=0.3), 0)  # 6 and more will do
    seconds, stuck = found["late"]
    assert stuck == 2 + 1
    assert 0.1 < seconds < 5
    assert found["again"] == (pytest.approx(0, abs=0.3), 2 + 1)  # source 1 is late too, but nobody waits any more


def packed(head_dim: int) -> bool:
    """Whether the kernel packs what index_select does, from tensors that lie as views do."""
    whole = torch.randn(50, 6, 2 * head_dim, generator=torch.Generator().manual_seed(0))
    k, v = whole[:, :3, :head_dim], whole[:, 3:, head_dim:]
    index = torch.from_numpy(np.random.default_rng(0).permutation(50)[:41])
    wanted = torch.stack((k.index_select(0, index), v.index_select(0, index)), dim=1)
    nothing = pack_rows(k, v, index[:0])
    return torch.equal(pack_rows(k, v, index), wanted) and nothing.shape == (0, 2, 3, head_dim)


@pytest.mark.parametrize("head_dim", [16, 24])
def test_rows_are_packed_in_the_order_in_which_they_leave(head_dim: int) -> None:
    assert interpreted(packed, head_dim)


class Case(NamedTuple):
    """A pack on some ranks, and one of them whose attention starts before its rows are there."""

    lengths: tuple[int, ...]
    ranks: int
    strategy: str
    exchange: str
    reader: int
    heads: tuple[int, int]
    dtype: torch.dtype
    attention: str
    order: str = "chance"  # in which sources send: that, or rising or falling


def rows_of_pack(plan: ShardingPlan, segments: Segments) -> Tensor:
    """Rows of the pack that a list of segments holds, in order."""
    lengths = segments.stop - segments.start
    return torch.from_numpy(expand_ranges(plan.offsets[segments.document] + segments.start, lengths))


SMALL = Tuning.from_text("forward=16x16x4x1xieee")
HEAD_DIM = 16


def fused(rank: int, case: Case, seed: int, *shape: Any) -> tuple[float, float] | None:
    """Process 0 attends as `case.reader`; process 1 is everybody else, who send late."""
    plan = flashcp.plan(case.lengths, case.ranks, case.strategy)
    q, k, v, _ = random_qkv(sum(case.lengths), *case.heads, HEAD_DIM, case.dtype, seed)
    received = plan.route(case.exchange).received(case.reader)
    heap = Heap(*shape)
    begun = heap.flags(BEGUN)
    if rank == 1:
        send_late(case, plan, heap, torch.stack((k, v), dim=1), received, np.random.default_rng(seed))
        return None
    local, size = plan.local(case.reader), int(received.buffer_rows().max()) + 1
    mine = rows_of_pack(plan, local)
    buffer = heap.rows().view(case.dtype)[:size, : 2 * k[0].numel()].view(size, 2, *k.shape[1:])
    arguments = q[mine], KV(k[mine], v[mine]), KV(buffer[:, 0], buffer[:, 1])
    schedule = build_schedule(local, local=local, received=received)
    kernel = select_attention(case.attention, CPU, SMALL)
    buffer.fill_(torch.nan)
    one_sided.spins(CPU, 1.0)
    begun[0] = 1
    start = time.perf_counter()
    out, _ = kernel.attend(*arguments, schedule, HEAD_DIM**-0.5, heap.wait_flags(5))
    took = time.perf_counter() - start
    assert heap.stuck.item() == 0
    expected = flashcp.reference_attention(q.double(), k.double(), v.double(), case.lengths)[mine]
    return took, relative_error(out, expected)


def send_late(
    case: Case, plan: ShardingPlan, heap: Heap, kv: Tensor, received: Segments, random: np.random.Generator
) -> None:
    """Each source's rows, its flag behind them, when the reader has begun."""
    begun = heap.flags(BEGUN)
    while begun[0] == 0:
        time.sleep(0.001)
    sources = np.unique(received.rank)
    order = {"rising": sources, "falling": sources[::-1], "chance": random.permutation(sources)}[case.order]
    for source in order.tolist():
        time.sleep(random.uniform(0.15, 0.3))
        part = received.take(received.rank == source)
        into = torch.from_numpy(expand_ranges(part.row, part.stop - part.start))
        rows = heap.rows().view(case.dtype)
        rows[into, : kv[0].numel()] = kv.flatten(1)[rows_of_pack(plan, part)]
        heap.flags(CAME)[source] = 5 + source % 2


EXACT = Case((13, 1, 53, 2, 47), 3, "per_document", "exact", 1, (4, 2), torch.float32, "triton")
FUSED = {
    "exact, rising": EXACT._replace(order="rising"),
    "exact, falling": EXACT._replace(order="falling"),
    "exact fp16": EXACT._replace(reader=2, dtype=torch.float16, heads=(2, 2)),
    "sources that touch": Case((100,), 4, "contiguous", "exact", 3, (2, 1), torch.float32, "triton", "falling"),
    "compacted": Case(random_lengths(3), 4, "flashcp_paper", "compacted", 3, (2, 1), torch.float32, "triton"),
    "all_gather": Case((70, 30), 3, "per_sequence", "all_gather", 1, (1, 1), torch.float32, "triton"),
    "cpu": EXACT._replace(attention="cpu", order="falling"),
}


@pytest.mark.parametrize("case", FUSED.values(), ids=FUSED)
def test_attention_waits_for_each_source_and_matches_the_reference(case: Case, tmp_path: Path) -> None:
    heap = poisoned(tmp_path, case.ranks, sum(case.lengths) + 8, 2 * case.heads[1] * HEAD_DIM)
    (took, error), _ = interpreted_together(fused, 2, case, 1, *heap)
    assert error < {torch.float32: 1e-5, torch.float16: 2e-3}[case.dtype]
    assert took > 0.15
