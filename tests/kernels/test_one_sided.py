"""One-sided verbs, and attention that waits for rows, between processes that share memory, under the interpreter.

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
from flashcp.kernels.arrivals import Arrivals
from flashcp.kernels.cpu import KV
from flashcp.kernels.schedule import build_schedule
from flashcp.kernels.selection import select_attention
from flashcp.kernels.tuning import Tuning
from flashcp.sharding.documents import expand_ranges
from flashcp.sharding.plan import Segments, ShardingPlan
from tests.interpreter import interpreted, interpreted_together
from tests.packs import random_lengths, random_qkv, relative_error

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from flashcp.kernels import transfers  # noqa: E402
from flashcp.kernels.one_sided import get_rows, put_signal, wait_until  # noqa: E402
from flashcp.kernels.transfers import Moves, Region, make_moves  # noqa: E402

CPU = torch.device("cpu")
HEADS, DIM = 2, 24  # 24: rows that fill three quarters of a block
CAME, CLEARED, READ, BEGUN, REGION = 0, 64, 128, 192, 256  # bytes into a heap: flags for four purposes, then rows
PATIENCE_S = 30.0


class Heaps:
    """Heaps of some ranks in files that several processes map, as rank `rank` sees them."""

    def __init__(self, folder: Path, world_size: int, rank: int, rows: int, width: int) -> None:
        size, self.rank, self.width = REGION + 4 * rows * width, rank, width
        files = [str(folder / f"heap{r}") for r in range(world_size)]
        self.bytes = [torch.from_file(file, shared=True, size=size, dtype=torch.uint8) for file in files]
        self.bases = torch.tensor([heap.data_ptr() for heap in self.bytes])
        self.region = Region(self.bases, rank, REGION, width)
        self.stuck, self.done = torch.zeros(1, dtype=torch.int32), torch.zeros(world_size, dtype=torch.int32)

    def flags(self, which: int, rank: int | None = None) -> Tensor:
        """This rank's flags for a purpose, or another's."""
        heap = self.bytes[self.rank if rank is None else rank]
        return heap[which : which + 4 * len(self.bytes)].view(torch.int32)

    def rows(self, rank: int | None = None) -> Tensor:
        """The region as fp32 [rows, width]."""
        return self.bytes[self.rank if rank is None else rank][REGION:].view(torch.float32).view(-1, self.width)

    def arrivals(self, which: int, epoch: int, timeout_s: float = PATIENCE_S) -> Arrivals:
        return Arrivals(self.flags(which), epoch, self.stuck, timeout_s)

    def others(self) -> Tensor:
        return torch.tensor([r for r in range(len(self.bytes)) if r != self.rank], dtype=torch.int32)


def poisoned(folder: Path, world_size: int, rows: int, width: int) -> tuple[Path, int, int, int]:
    """Fresh heaps whose rows are NaN; what `Heaps` takes but for the rank."""
    for rank in range(world_size):
        Heaps(folder, world_size, rank, rows, width).rows().fill_(torch.nan)
    return folder, world_size, rows, width


def sent_rows(epoch: int, source: int, to: int) -> tuple[Tensor, np.ndarray, int]:
    """What a rank sends: its tensor [20, 2 HEADS, DIM], the rows of it that go to `to`, where they land."""
    x = torch.randn(20, 2 * HEADS, DIM, generator=torch.Generator().manual_seed(10 * epoch + source))
    index = np.random.default_rng([epoch, source, to]).integers(0, 20, 40)  # more than a block of rows
    return x, index, 40 * source


def moves_of(index: list[np.ndarray], others: list[int], at: list[int], world_size: int, tensors: int) -> Moves:
    count = np.array([len(rows) for rows in index])
    return make_moves(np.concatenate(index), np.array(others), count, np.array(at), world_size, CPU, tensors)


def put_rounds(rank: int, rounds: int, folder: Path, *shape: int) -> None:
    """Each rank sends keys and values apart, waits for everybody's, takes its time and lets them send the next."""
    heaps = Heaps(folder, shape[0], rank, *shape[1:])
    random, others = np.random.default_rng(rank), heaps.others().tolist()
    for epoch in range(1, rounds + 1):
        sends = [sent_rows(epoch, rank, to) for to in others]
        moves = moves_of([index for _, index, _ in sends], others, [at for *_, at in sends], shape[0], tensors=2)
        x = sends[0][0]
        for half, offset in ((x[:, :HEADS], 0), (x[:, HEADS:], 4 * HEADS * DIM)):
            time.sleep(random.uniform(0, 0.05))
            into = heaps.region._replace(offset=REGION + offset)
            transfers.put(half, moves, into, CAME, epoch, heaps.arrivals(CLEARED, epoch - 1), heaps.done, programs=2)
        transfers.wait(heaps.others(), heaps.arrivals(CAME, epoch))
        for look in range(2):
            for source in others:
                sent, index, at = sent_rows(epoch, source, rank)
                found = heaps.rows()[at : at + len(index)].view(len(index), 2 * HEADS, DIM)
                assert torch.equal(found, sent[index]), (epoch, source, rank, look)
            time.sleep(random.uniform(0, 0.1))
        heaps.rows().fill_(torch.nan)
        transfers.signal(heaps.others(), heaps.bases, rank, CLEARED, epoch)
    assert heaps.done.count_nonzero() == heaps.stuck.item() == 0


def test_rows_are_there_when_their_flag_is_up(tmp_path: Path) -> None:
    interpreted_together(put_rounds, 3, 4, *poisoned(tmp_path, 3, 120, 2 * HEADS * DIM))


def get_rounds(rank: int, rounds: int, folder: Path, *shape: int) -> None:
    """Each rank lays out rows of its own, late; the others fetch some, and it lays out the next when they have read."""
    heaps = Heaps(folder, shape[0], rank, *shape[1:])
    random, others = np.random.default_rng(rank), heaps.others().tolist()
    for epoch in range(1, rounds + 1):
        transfers.wait(heaps.others(), heaps.arrivals(READ, epoch - 1))
        heaps.rows().fill_(torch.nan)
        time.sleep(random.uniform(0, 0.1))
        heaps.rows().copy_(sent_rows(epoch, rank, 0)[0].flatten(1))
        transfers.signal(heaps.others(), heaps.bases, rank, BEGUN, epoch)

        wanted = [sent_rows(epoch, source, rank) for source in others]
        moves = moves_of([index for _, index, _ in wanted], others, [at for *_, at in wanted], shape[0], tensors=1)
        x = torch.full((120, 2 * HEADS, DIM), torch.nan)
        ready = heaps.arrivals(BEGUN, epoch)
        transfers.get(x, moves, heaps.region, READ, CAME, epoch, ready, heaps.done, programs=2)
        for sent, index, at in wanted:
            assert torch.equal(x[at : at + 40], sent[index])
        assert x.isnan().any(dim=(1, 2)).sum() == 40  # where this rank's own rows would lie
        assert heaps.flags(CAME).tolist() == [epoch * (r != rank) for r in range(shape[0])]
    assert heaps.done.count_nonzero() == heaps.stuck.item() == 0


def test_rows_are_fetched_when_they_are_ready(tmp_path: Path) -> None:
    interpreted_together(get_rounds, 3, 4, *poisoned(tmp_path, 3, 20, 2 * HEADS * DIM))


@triton.jit
def ring_kernel(bases, rank, flags, stuck, spins, out, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Put a tile on the other of two ranks with a signal, wait for its tile, and fetch back what one put there."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    values = (1000 * rank + 16 * rows[:, None] + columns[None, :]).to(tl.float32)
    other = 1 - rank
    put_signal(bases, other, 256, rows + 2, WIDTH, values, rows < 5, 4 * rank, 3, WIDTH - 1)
    wait_until(flags + other, 2, spins, stuck, other)
    mine = get_rows(bases, rank, 256, rows + 2, WIDTH, rows < 5, tl.float32, WIDTH, WIDTH)
    back = get_rows(bases, other, 256, rows + 2, WIDTH, rows < 5, tl.float32, WIDTH, WIDTH)
    tl.store(out + rows[:, None] * WIDTH + columns[None, :], mine)
    tl.store(out + (ROWS + rows[:, None]) * WIDTH + columns[None, :], back)


def ring(rank: int, folder: Path, *shape: int) -> tuple[Tensor, Tensor]:
    heaps, out = Heaps(folder, shape[0], rank, *shape[1:]), torch.empty(16, 16)
    time.sleep(0.1 * rank)
    ring_kernel[(1,)](heaps.bases, rank, heaps.flags(CAME), heaps.stuck, 20_000, out, ROWS=8, WIDTH=16)
    assert heaps.stuck.item() == 0
    return out, heaps.rows().clone()


def test_the_verbs_in_a_kernel_of_ones_own(tmp_path: Path) -> None:
    tile = 16.0 * torch.arange(8)[:, None] + torch.arange(16)
    for rank, (out, rows) in enumerate(interpreted_together(ring, 2, *poisoned(tmp_path, 2, 9, 16))):
        for part, sender in ((out[:8], 1 - rank), (out[8:], rank)):
            assert torch.equal(part[:5, :15], 1000 * sender + tile[:5, :15])
            assert (part[5:] == 0).all()
        assert rows[2:7, :15].isfinite().all()
        assert rows.isnan().sum() == 9 * 16 - 5 * 15  # nothing else was written


def late(folder: Path, *shape: int) -> dict[str, Any]:
    """Rank 0 alone: nobody answers."""
    heaps, found = Heaps(folder, shape[0], 0, *shape[1:]), dict[str, Any]()

    def timed(name: str, launch: Any) -> None:
        start = time.perf_counter()
        launch()
        found[name] = time.perf_counter() - start, heaps.stuck.item()

    transfers.spins(CPU, 1.0)  # measured before
    heaps.flags(CAME)[:] = torch.tensor([0, 7, 6, 7])
    every = torch.tensor([1, 2, 3], dtype=torch.int32)
    timed("higher", lambda: transfers.wait(every, heaps.arrivals(CAME, 6)))
    timed("late", lambda: transfers.wait(every, heaps.arrivals(CAME, 7, timeout_s=0.5)))
    timed("again", lambda: transfers.wait(every, heaps.arrivals(CAME, 8)))
    heaps.stuck.zero_()
    moves = moves_of([np.arange(40), np.arange(3)], [3, 1], [0, 0], 4, tensors=1)
    heaps.flags(CLEARED)[1] = 9
    clear = heaps.arrivals(CLEARED, 9, timeout_s=0.2)
    timed("put", lambda: transfers.put(torch.ones(40, 1, 16), moves, heaps.region, CAME, 9, clear, heaps.done))
    found["written"] = [int(heaps.rows(r).isfinite().all(1).sum()) for r in range(4)]
    found["told"] = [int(heaps.flags(CAME, r)[0]) for r in range(4)]
    heaps.stuck.zero_()
    x = torch.full((40, 1, 16), torch.nan)
    timed("get", lambda: transfers.get(x, moves, heaps.region, READ, CAME, 9, clear, torch.zeros_like(heaps.done)))
    found["read"] = int(x.isfinite().sum())
    transfers.signal(every, heaps.bases, 0, CAME, 4)
    found["never lower"] = int(heaps.flags(CAME, 1)[0])
    return found


def test_a_wait_for_what_never_comes_ends_and_names_the_source(tmp_path: Path) -> None:
    found = interpreted(late, *poisoned(tmp_path, 4, 40, 16))
    assert found["higher"] == (pytest.approx(0, abs=0.3), 0)  # 6 and more will do
    seconds, stuck = found["late"]
    assert stuck == 2 + 1
    assert 0.1 < seconds < 5
    assert found["again"] == (pytest.approx(0, abs=0.3), 2 + 1)  # source 1 is late too, but nobody waits any more
    seconds, stuck = found["put"]
    assert stuck == 3 + 1
    assert seconds < 2
    assert found["written"] == [0, 3, 0, 0]  # nothing where rank 3 may still read
    assert found["told"] == [0, 9, 0, 0]
    assert found["get"][1] == 3 + 1
    assert found["read"] == 3 * 16
    assert found["never lower"] == 9


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


def pack_rows(plan: ShardingPlan, segments: Segments) -> Tensor:
    """Rows of the pack that a list of segments holds, in order."""
    lengths = segments.stop - segments.start
    return torch.from_numpy(expand_ranges(plan.offsets[segments.document] + segments.start, lengths))


SMALL = Tuning.from_text("forward=16x16x4x1xieee")
HEAD_DIM = 16


def fused(rank: int, case: Case, seed: int, folder: Path, *shape: int) -> tuple[float, float] | None:
    """Process 0 attends as `case.reader`; process 1 is everybody else, who send late."""
    plan = flashcp.plan(case.lengths, case.ranks, case.strategy)
    q, k, v, _ = random_qkv(sum(case.lengths), *case.heads, HEAD_DIM, case.dtype, seed)
    received = plan.route(case.exchange).received(case.reader)
    heaps = Heaps(folder, shape[0], case.reader, *shape[1:])
    begun = heaps.flags(BEGUN)
    if rank == 1:
        send_late(case, plan, heaps, torch.stack((k, v), dim=1), received, np.random.default_rng(seed))
        return None
    local, size = plan.local(case.reader), int(received.buffer_rows().max()) + 1
    mine = pack_rows(plan, local)
    buffer = heaps.rows().view(case.dtype)[:size, : 2 * k[0].numel()].view(size, 2, *k.shape[1:])
    arguments = q[mine], KV(k[mine], v[mine]), KV(buffer[:, 0], buffer[:, 1])
    schedule = build_schedule(local, local=local, received=received)
    kernel = select_attention(case.attention, CPU, SMALL)
    buffer.fill_(torch.nan)
    arrivals = heaps.arrivals(CAME, 5)
    transfers.spins(CPU, 1.0)
    begun[0] = 1
    start = time.perf_counter()
    out, _ = kernel.attend(*arguments, schedule, HEAD_DIM**-0.5, arrivals)
    took = time.perf_counter() - start
    assert heaps.stuck.item() == 0
    expected = flashcp.reference_attention(q.double(), k.double(), v.double(), case.lengths)[mine]
    return took, relative_error(out, expected)


def send_late(
    case: Case, plan: ShardingPlan, heaps: Heaps, kv: Tensor, received: Segments, random: np.random.Generator
) -> None:
    """Each source's rows by a put of its own, its flag behind them, when the reader has begun."""
    begun = heaps.flags(BEGUN)
    while begun[0] == 0:
        time.sleep(0.001)
    sources = np.unique(received.rank)
    order = {"rising": sources, "falling": sources[::-1], "chance": random.permutation(sources)}[case.order]
    for source in order.tolist():
        time.sleep(random.uniform(0.15, 0.3))
        part = received.take(received.rank == source)
        index, count = pack_rows(plan, part).numpy(), part.stop - part.start
        moves = make_moves(index, np.full(len(count), case.reader), count, part.row, case.ranks, CPU)
        into = Region(heaps.bases, source, REGION, heaps.width * 4 // case.dtype.itemsize)
        anytime = heaps.arrivals(CLEARED, 0)
        done = torch.zeros(case.ranks, dtype=torch.int32)
        transfers.put(kv.flatten(1, 2), moves, into, CAME, 5 + source % 2, anytime, done)


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
    heaps = poisoned(tmp_path, case.ranks, sum(case.lengths) + 8, 2 * case.heads[1] * HEAD_DIM)
    (took, error), _ = interpreted_together(fused, 2, case, 1, *heaps)
    assert error < {torch.float32: 1e-5, torch.float16: 2e-3}[case.dtype]
    assert took > 0.15
