"""The one-sided exchange under delays, reuse, faults and thrown-away graphs: CPU attention over shared memory."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import flashcp
from flashcp.comm.errors import ExchangeError, HeapError
from flashcp.comm.fabrics.base import Put
from flashcp.comm.fabrics.memory import shared_memories
from flashcp.comm.fabrics.shm import ShmFabric
from flashcp.comm.transport import OutgoingRows
from flashcp.kernels.tuning import Tuning
from tests.interpreter import interpreted_cases
from tests.packs import random_lengths, random_qkv, relative_error
from tests.ranks import run_cases, run_ranks

RECEIVING = ("exact", "compacted", "all_gather")
LENGTHS = (61, 5, 30)
TUNING = Tuning.from_text("forward=16x16x4x1,backward_kv=16x16x4x1,backward_q=16x16x4x1")


@contextmanager
def slow_senders(seed: int) -> Iterator[random.Random]:
    """Every put waits a moment that is drawn at random, on each rank another."""
    draw = random.Random(f"{seed} {dist.get_rank()}")
    carry = ShmFabric._carry

    def late(fabric: ShmFabric, put: Put) -> None:
        time.sleep(draw.choice([0, 0, 0.003]))
        carry(fabric, put)

    with patch.object(ShmFabric, "_carry", late):
        yield draw


def sharded(
    cp: flashcp.ContextParallel, plan: flashcp.ShardingPlan, seed: int, grad: bool = True, heads: int = 4
) -> list[Tensor]:
    *qkv, _ = random_qkv(int(plan.offsets[-1]), heads, heads // 2, 8, torch.float32, seed)
    return [cp.shard(x, plan).requires_grad_(grad) for x in qkv]


@torch.enable_grad()
def exact_results(plan: flashcp.ShardingPlan, cp: flashcp.ContextParallel, seed: int, heads: int = 4) -> list[Tensor]:
    """Output and gradients (of the sum of squares / 2) that the reference gives this rank's rows."""
    *qkv, _ = random_qkv(int(plan.offsets[-1]), heads, heads // 2, 8, torch.float32, seed)
    whole = [x.double().requires_grad_() for x in qkv]
    out = flashcp.reference_attention(*whole, plan.document_lengths)
    return [cp.shard(x, plan) for x in (out, *torch.autograd.grad(out, whole, out.detach()))]


def layers_and_steps(exchange: str, overlap: str, stages: int, backward: str, layers: int, steps: int) -> float:
    """The largest error over steps of layers whose rows all differ: a row of another layer or step would show."""
    cp = flashcp.ContextParallel(
        exchange=exchange, overlap=overlap, backward=backward, stages=stages, transport="shm", timeout_s=30
    )
    worst = 0.0
    with slow_senders(layers) as draw:
        for step in range(steps):
            plan = flashcp.plan(random_lengths(step, 20), cp.world_size, "per_document")
            state = []
            for layer in range(layers):
                q, k, v = sharded(cp, plan, seed=100 * step + layer)
                handle = cp.prefetch(k, v, plan)
                time.sleep(draw.choice([0, 0, 0.002]))
                state.append((handle.attention(q), (q, k, v)))
            for layer in reversed(range(layers)):
                out, leaves = state[layer]
                time.sleep(draw.choice([0, 0, 0.002]))
                found = [out.detach(), *torch.autograd.grad(out, leaves, out.detach())]
                expected = exact_results(plan, cp, 100 * step + layer)
                worst = max(worst, *map(relative_error, found, expected))
    return worst


def test_a_put_that_has_room_overtakes_one_that_waits_for_it() -> None:
    """Whatever rows the two carry."""
    fabric = ShmFabric(0, 1, shared_memories(0, lambda words: [words]), timeout_s=5)
    region = fabric.allocate(0, 1024)
    waiting, ready = (
        Put(region, OutgoingRows(torch.full((rows, 4), value)), 0, rows, 0, offset, (4,), torch.float32, after, epoch)
        for rows, value, offset, after, epoch in ((8, 1.0, 0, 1, 2), (3, 2.0, 512, 0, 1))
    )
    left = fabric.put([waiting, ready])
    fabric.wait(region, 0, ready.epoch)
    fabric.free(region, waiting.after)
    fabric.wait(region, 0, waiting.epoch)
    left()
    data = region.data(0, 0, 1024).view(torch.float32)
    assert data[:32].eq(1).all()
    assert data[128:140].eq(2).all()
    fabric.close()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_twenty_layers_three_steps_and_delays_leave_no_stale_row(ranks: int) -> None:
    cases = [("exact", "staged", 2, "keep", 20, 3), ("exact", "staged", 1, "refetch", 20, 3)]
    assert max(max(errors) for errors in run_cases(layers_and_steps, ranks, cases)) < 1e-5


def test_every_exchange_overlap_and_stage_with_delays() -> None:
    keep = ("keep", "refetch")
    levels = (("none", 1), ("staged", 1), ("staged", 3), ("fused", 1))
    cases = [(exchange, *level, held, 3, 2) for exchange in RECEIVING for level in levels for held in keep]
    others = [(exchange, "staged", 1, held, 3, 2) for exchange in ("ring", "ulysses") for held in keep]
    for ranks, chosen in ((3, cases), (2, others)):
        for case, errors in zip(chosen, run_cases(layers_and_steps, ranks, chosen), strict=True):
            assert max(errors) < 1e-5, case


def spinning_kernels(exchange: str, backward: str, seeds: range) -> float:
    """The largest error of interpreted kernels that wait, inside one launch, for rows that other processes put."""
    cp = flashcp.ContextParallel(
        exchange=exchange, overlap="fused", attention="triton", backward=backward, transport="shm", tuning=TUNING,
        timeout_s=60,
    )  # fmt: skip
    strategies = flashcp.strategies()
    worst = 0.0
    with slow_senders(seeds.start) as draw:
        for seed in seeds:
            lengths = draw_lengths(seed)
            plan = flashcp.plan(lengths, cp.world_size, strategies[seed % len(strategies)])
            q, k, v = sharded(cp, plan, seed, heads=2)
            handle = cp.prefetch(k, v, plan)
            time.sleep(draw.choice([0, 0, 0.01]))
            out = handle.attention(q)
            found = [out.detach(), *torch.autograd.grad(out, (q, k, v), out.detach())]
            worst = max(worst, *map(relative_error, found, exact_results(plan, cp, seed, heads=2)))
    return worst


def draw_lengths(seed: int) -> tuple[int, ...]:
    """One to three documents of up to 20 tokens, at least 8 in all: a tile takes an interpreted kernel milliseconds."""
    draw = random.Random(seed)
    return (*(draw.randint(1, 20) for _ in range(draw.randint(0, 2))), draw.randint(8, 20))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_kernels_that_spin_on_other_processes_flags(ranks: int) -> None:
    plans = {2: range(12), 3: range(12, 21), 4: range(21, 27)}[ranks]
    cut = plans.start + len(plans) // 3
    cases = [("exact", "keep", range(plans.start, cut)), ("compacted", "refetch", range(cut, plans.stop))]
    pytest.importorskip("triton")
    assert max(max(errors) for errors in interpreted_cases(spinning_kernels, ranks, cases, timeout_s=120)) < 1e-5


def far_ahead(acknowledged: bool) -> float:
    """Rank 0 prefetches layers ahead while rank 1 has not read the rows that lie where they go."""
    cp = flashcp.ContextParallel(overlap="none", transport="shm", timeout_s=30)
    plan = flashcp.plan(LENGTHS, cp.world_size, "per_document")
    worst = 0.0
    with ExitStack() as stack, torch.no_grad():
        if not acknowledged:
            stack.enter_context(patch.object(ShmFabric, "_is_free", lambda fabric, put: True))
        layers = [sharded(cp, plan, seed, grad=False) for seed in range(12)]
        handles = [cp.prefetch(k, v, plan) for _, k, v in layers[:2]]
        for layer, (q, _, _) in enumerate(layers):
            time.sleep(0.05 * cp.rank)
            out = handles[layer].attention(q)
            worst = max(worst, relative_error(out, exact_results(plan, cp, layer)[0]))
            if layer + 2 < len(layers):
                handles.append(cp.prefetch(*layers[layer + 2][1:], plan))
    return worst


def test_a_region_is_written_again_only_when_its_readers_are_done() -> None:
    assert max(run_ranks(far_ahead, 2, True)) < 1e-5
    assert max(run_ranks(far_ahead, 2, False)) > 1e-2, "without acknowledgement this test would see a stale row"


def a_sender_that_never_sends(overlap: str) -> list[tuple[str, str, float]]:
    """What two calls raise, and after how long; rank 1's rows never leave, and only rank 2 reads them."""
    cp = flashcp.ContextParallel(overlap=overlap, transport="shm", timeout_s=1)
    shards = [(0, 0, 8, 0), (1, 0, 8, 1), (1, 8, 12, 2), (2, 0, 4, 2)]
    plan = flashcp.ShardingPlan.from_shards((8, 12, 4), 3, shards)
    q, k, v = sharded(cp, plan, 0, grad=False)
    said = []
    with patch.object(ShmFabric, "_is_free", lambda fabric, put: fabric.rank != 1):
        for _ in range(2):
            began = time.monotonic()
            try:
                cp.attention(q, k, v, plan)
                said.append(("", "", time.monotonic() - began))
                time.sleep(0.5)
            except ExchangeError as error:
                said.append((type(error).__name__, str(error), time.monotonic() - began))
                break
        time.sleep(1.5)  # a rank that began later still waits for the rows: they must not leave before it has given up
    return said


@pytest.mark.parametrize("overlap", ["none", "staged", "fused"])
def test_a_sender_that_never_sends_is_named_on_every_rank(overlap: str) -> None:
    (reader_0, sender, reader) = run_ranks(a_sender_that_never_sends, 3, overlap)
    assert all(seconds < 5 for said in (reader_0, sender, reader) for *_, seconds in said)
    assert reader[0][0] == "ExchangeTimeoutError"
    assert "rank 2 waited 1 s for the rows of rank 1 (epoch 1)" in reader[0][1]
    assert "(call 1)" in reader[0][1]
    assert sender[0][0] == "ExchangeTimeoutError"
    assert sender[0][1].startswith("rank 1 waited 1 s for ")
    assert reader_0[0][0] == ""  # it reads nobody's rows: it hears of it at its next call
    assert reader_0[1][0] == "PeerFailedError"
    assert "ranks 1, 2 stopped" in reader_0[1][1]


def thrown_away(what: str) -> tuple[int, float]:
    """Regions after many calls whose graphs nobody walks back, or that are computed again; and the last error."""
    cp = flashcp.ContextParallel(transport="shm", timeout_s=30)
    plan = flashcp.plan(LENGTHS, cp.world_size, "per_document")
    for seed in range(12):
        q, k, v = sharded(cp, plan, seed)
        if what == "no gradients":
            with torch.no_grad():
                out = cp.attention(q, k, v, plan)
        elif what == "graphs":
            out = cp.attention(q, k, v, plan)
        elif what == "handles":
            cp.prefetch(k, v, plan)
            out = cp.attention(q, k, v, plan)
        elif what == "checkpoints":
            hidden = q
            for _ in range(6):
                hidden = checkpoint(lambda x, k=k, v=v: cp.attention(x, k, v, plan), hidden, use_reentrant=False)
            out = hidden
            torch.autograd.grad(out.square().sum(), (q, k, v))
    first = out if what != "checkpoints" else cp.attention(q, k, v, plan)
    return len(cp._transport.heap.regions), relative_error(first.detach(), exact_results(plan, cp, 11)[0])  # type: ignore[attr-defined]


def test_graphs_thrown_away_or_computed_again_do_not_pile_up() -> None:
    cases = [("no gradients",), ("graphs",), ("handles",), ("checkpoints",)]
    for case, ranks in zip(cases, run_cases(thrown_away, 2, cases), strict=True):
        assert all(error < 1e-5 for _, error in ranks), case
        assert len({regions for regions, _ in ranks}) == 1, "ranks differ in their regions"
        assert ranks[0][0] <= {"no gradients": 2, "graphs": 4, "handles": 6, "checkpoints": 6}[case[0]], (case, ranks)


def walked_back_twice(exchange: str) -> list[bool]:
    cp = flashcp.ContextParallel(exchange=exchange, transport="shm", timeout_s=30)
    plan = flashcp.plan(LENGTHS, cp.world_size, "per_document")
    leaves = sharded(cp, plan, 0)
    out = cp.attention(*leaves, plan)
    first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    others = sharded(cp, plan, 1)
    cp.attention(*others, plan)  # takes the region that the first backward freed
    cp.attention(*others, plan)
    return list(map(torch.equal, first, torch.autograd.grad(out.sum(), leaves)))


def test_a_graph_can_be_walked_back_twice() -> None:
    cases = [(exchange,) for exchange in (*RECEIVING, "ring", "ulysses")]
    assert all(same for ranks in run_cases(walked_back_twice, 2, cases) for rank in ranks for same in rank)


def past_the_limit() -> str:
    cp = flashcp.ContextParallel(transport="shm", options=flashcp.TransportOptions(heap_mib=0.0625), timeout_s=10)
    plan = flashcp.plan((2000,), cp.world_size, "per_document")
    with pytest.raises(HeapError) as raised:
        cp.attention(*sharded(cp, plan, 0), plan)
    return str(raised.value)


def test_every_rank_refuses_more_memory_than_the_limit() -> None:
    for said in run_ranks(past_the_limit, 2):
        assert "MiB more than heap_mib=0.0625: raise heap_mib" in said
