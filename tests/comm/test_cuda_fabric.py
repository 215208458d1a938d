"""The CUDA fabric, and all above it, on emulated devices; and that the emulation sees the faults it is there for."""

from __future__ import annotations

import gc
import inspect
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import flashcp
from flashcp.comm.errors import ExchangeError, HeapError
from flashcp.comm.fabrics import cuda
from flashcp.comm.fabrics.base import Put
from flashcp.comm.fabrics.cuda import CudaFabric, Memories, symmetric_memories
from flashcp.comm.fabrics.cuda_device import CudaDevice, Event, Stream
from flashcp.comm.transport import OutgoingRows
from tests.emulation.device import EmulatedDevice, FaultError
from tests.emulation.ranks import Rank, run_emulated
from tests.emulation.schedules import LIMIT, Program, draw_program, errors_of, layers, worst_of_one
from tests.emulation.world import DeadlockError
from tests.packs import random_qkv

ONE_TRANSFER = ("exact", "compacted", "all_gather")
LENGTHS = (61, 5, 30)
SCHEDULES, EVERY, PARTS = 1000, 4, 5


@pytest.mark.parametrize("part", range(PARTS))
def test_random_schedules(part: int) -> None:
    """Every fourth of the thousand that `make emulate` runs."""
    for seed in range(part * EVERY, SCHEDULES, PARTS * EVERY):
        program, error = worst_of_one(seed)
        assert error < LIMIT, (seed, program)


def test_the_programs_are_all_there_is() -> None:
    drawn = [draw_program(seed) for seed in range(SCHEDULES)]
    assert {(p.exchange, p.overlap, p.backward) for p in drawn} == {
        *((e, o, b) for e in ONE_TRANSFER for o in ("none", "staged", "fused") for b in ("keep", "refetch")),
        *((e, o, b) for e in ("ring", "ulysses") for o in ("none", "staged") for b in ("keep", "refetch")),
    }
    assert {p.ranks for p in drawn} == {2, 3, 4}
    assert sum(p.discards > 0 for p in drawn) > 200
    assert sum(p.queues == 1 for p in drawn) > 200
    assert {(p.ranks, p.head_ranks) for p in drawn} == {(2, 1), (2, 2), (3, 1), (4, 1), (4, 2), (4, 4)}


@pytest.mark.parametrize(
    ("ranks", "overlap", "backward"), [(2, "staged", "keep"), (3, "fused", "refetch")]
)
def test_twenty_layers_three_steps(ranks: int, overlap: str, backward: str) -> None:
    program = Program(ranks, "exact", overlap, backward, steps=3, layers=20, most_tokens=20)
    assert max(errors_of(program, 7)) < LIMIT


def rows_of(rank: Rank, cp: flashcp.ContextParallel, plan: flashcp.ShardingPlan, seed: int = 0) -> list[Tensor]:
    *qkv, _ = random_qkv(int(plan.offsets[-1]), 4, 4, 8, torch.float32, seed)
    return [rank.device.upload(cp.shard(x, plan)) for x in qkv]


def test_the_emulated_device_offers_what_the_real_one_does() -> None:
    real = {name: asked for name, asked in vars(CudaDevice).items() if inspect.isfunction(asked) and name[0] != "_"}
    assert len(real) == 14
    for name, asked in real.items():
        offered = inspect.signature(getattr(EmulatedDevice, name)).parameters
        assert list(offered) == list(inspect.signature(asked).parameters), name


def test_the_fabric_asks_no_more_of_a_device_than_the_real_one_offers() -> None:
    asked = set(re.findall(r"\bdevice\.(\w+)\(", inspect.getsource(cuda)))
    assert len(asked) > 10
    assert asked <= {name for name in vars(CudaDevice) if name[0] != "_"}


# --- Faults put back. Each is caught, and the message says who waited for what, or what was touched. ---


def run_until_fault(program: Callable[[Rank], Any], seeds: int, **options: Any) -> None:
    """On two ranks, one schedule after another."""
    for seed in range(seeds):
        run_emulated(program, 2, seed, **options)


def unowned_memories(*arguments: Any) -> Memories:
    """Regions whose allocation nobody keeps."""
    real = symmetric_memories(*arguments)
    return lambda index, size: (real(index, size)[0], None)


def test_regions_that_nobody_keeps_are_freed_in_use() -> None:
    with pytest.raises(FaultError, match=r"rank \d, .*touches a symmetric region of rank \d, which was freed"):
        run_emulated(lambda rank: layers(Program(), 0, rank), 2, 0, memories=unowned_memories)


class SignalsByKernels(CudaFabric):
    """Flags raised by a kernel, as small as it may be."""

    def _send(self, put: Put, rows: Tensor, stream: Stream) -> None:
        region, device = put.region, self._device
        assert isinstance(device, EmulatedDevice)
        self._wait(region.flag(self.rank, 1, put.to), put.after, stream, "a place")
        device.copy(region.data(put.to, put.offset, rows.nbytes), rows.reshape(-1).view(torch.uint8), stream)
        word = region.flag(put.to, 0, self.rank)
        device.kernel("signal", lambda word: word.fill_(put.epoch) and None, [word], stream=stream)


@pytest.mark.parametrize("sms", [1, 4])
def test_a_put_that_needs_an_sm_deadlocks_with_kernels_that_spin(sms: int) -> None:
    program = Program(overlap="fused", layers=1)
    said = None
    for seed in range(10):  # on some schedules rows are there before the kernels start
        try:
            run_emulated(lambda rank: layers(program, 0, rank), 2, seed, fabric=SignalsByKernels, sms=sms)
        except DeadlockError as error:
            said = str(error)
    assert said is not None
    assert f"attention that spins, holding {sms} of {sms} SMs, waits for the rows of rank 0 (epoch 1)" in said
    assert "rank 0, puts to rank 1: signal waits for 1 free SMs of 0" in said
    for seed in range(10):
        run_emulated(lambda rank: layers(program, 0, rank), 2, seed, sms=sms)


@pytest.mark.parametrize(("fabric", "hidden"), [(CudaFabric, True), (SignalsByKernels, False)])
def test_rows_come_while_local_tiles_hold_every_sm(fabric: type[CudaFabric], hidden: bool) -> None:
    """A grid that fills the device until nothing else can happen: by then the rows of the others are here, or not."""
    plan = flashcp.plan(LENGTHS, 2, "per_document")
    here: list[bool] = []

    def program(rank: Rank) -> None:
        cp = rank.operator(overlap="staged")
        q, k, v = rows_of(rank, cp, plan)
        transport = rank.connection.transport
        rank.host.gives_way = 0.0  # the grid is there by the time that the rows are packed
        with torch.no_grad():
            handle = cp.prefetch(k, v, plan)
            rank.device.kernel("local tiles", lambda: None, [], sms=rank.device.sms, slow=True)
            region = next(iter(transport.heap.regions.values()))  # type: ignore[attr-defined]
            arrived = region.flag(rank.rank, 0, 1 - rank.rank)
            rank.device.kernel("look", lambda flag: here.append(int(flag[0]) >= 1), [arrived], sms=0)
            handle.attention(q)
            cp.synchronize()

    for seed in range(5):
        run_emulated(program, 2, seed, fabric=fabric)
    assert len(here) == 10
    assert set(here) == ({True} if hidden else {True, False})  # who ends last sees what the first one sent


class PacksBesides(CudaFabric):
    """Rows picked on the streams of the puts, and nobody told the allocator."""

    def put(self, puts: Any) -> Callable[[], None]:
        device, events = self._device, list[Event]()
        assert isinstance(device, EmulatedDevice)
        before = device.record(device.current_stream())
        for put in puts:
            stream = self._stream_to(put.to)
            device.wait_event(stream, before)
            compute, device._current = device._current, stream
            try:
                packed = put.outgoing.packed()
            finally:
                device._current = compute
            self._send(put, packed[put.start : put.stop], stream)
            events.append(device.record(stream))
        return lambda: [device.wait_event(device.current_stream(), event) for event in events] and None


def forget_handles(rank: Rank) -> None:
    cp = rank.operator()
    plan = flashcp.plan(LENGTHS, cp.world_size, "per_document")
    for seed in range(6):
        _, k, v = rows_of(rank, cp, plan, seed)
        cp.prefetch(k, v, plan)
        del k, v
    cp.synchronize()


def test_a_forgotten_handle_takes_no_memory_from_under_a_copy() -> None:
    run_until_fault(forget_handles, 10)
    said = r"rank \d, puts to rank \d: aten::\S+ touches input of rank \d, which was freed"
    with pytest.raises(FaultError, match=said):
        run_until_fault(forget_handles, 10, fabric=PacksBesides)


def test_packed_rows_live_until_they_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EmulatedDevice, "keep", lambda device, memory, stream: None)
    with pytest.raises(FaultError, match=r"rank \d, puts to rank \d: a copy touches a result of .* which was freed"):
        run_until_fault(forget_handles, 10)


def test_a_region_that_was_outgrown_lives_until_nobody_reads_it() -> None:
    def grow(rank: Rank) -> None:
        cp = rank.operator(overlap="staged", backward="refetch")
        with torch.no_grad():
            for tokens in (40, 40, 40, 400, 400, 400):
                plan = flashcp.plan((tokens,), cp.world_size, "per_document")
                cp.attention(*rows_of(rank, cp, plan, tokens), plan)
        cp.synchronize()

    class Hasty(CudaFabric):
        def retire(self, region: Any) -> None:
            pass

    run_until_fault(grow, 5)
    with pytest.raises(FaultError, match="touches a symmetric region"):
        run_until_fault(grow, 20, fabric=Hasty)


class Careless(CudaFabric):
    """Puts that do not wait for their place."""

    def _wait(self, word: Tensor, epoch: int, stream: Stream, what: str) -> None:
        if "free its receive buffer" not in what:
            super()._wait(word, epoch, stream, what)


def test_a_region_is_written_again_only_when_its_readers_are_done() -> None:
    program = Program(backward="refetch", layers=6, ahead=2)
    worst = 0.0
    for seed in range(5):
        worst = max(worst, *run_emulated(lambda rank: layers(program, 3, rank), 2, seed, fabric=Careless))
        assert max(errors_of(program, seed)) < LIMIT
    assert not worst < LIMIT


# --- What a rank is told. ---


class NeverSends(CudaFabric):
    """Rank 1's rows never leave."""

    def _send(self, put: Put, rows: Tensor, stream: Stream) -> None:
        if self.rank != 1:
            super()._send(put, rows, stream)


@pytest.mark.parametrize("overlap", ["none", "staged", "fused"])
def test_rows_that_never_come_raise_before_the_optimizer_step(overlap: str) -> None:
    plan = flashcp.plan(LENGTHS, 2, "per_document")
    stepped: list[int] = []
    said: dict[int, str] = {}

    def train(rank: Rank) -> None:
        cp = rank.operator(overlap=overlap)
        try:
            cp.attention(*rows_of(rank, cp, plan), plan)
            cp.synchronize()
            stepped.append(rank.rank)
        except ExchangeError as error:
            said[rank.rank] = str(error)

    run_emulated(train, 2, 0, fabric=NeverSends, patient=True)
    assert not stepped
    assert said[0].startswith("rank 0 waited 60 s for the rows of rank 1")
    assert said[1] == "rank 0 stopped with an error before the exchange (call 1); see its own message"


def test_a_deadlock_says_who_waits_for_what() -> None:
    def program(rank: Rank) -> None:
        cp = rank.operator(overlap="none")
        plan = flashcp.plan(LENGTHS, 2, "per_document")
        cp.attention(*rows_of(rank, cp, plan), plan)

    with pytest.raises(DeadlockError) as raised:
        run_emulated(program, 2, 0, fabric=NeverSends)
    assert "rank 0, compute: wait waits for a symmetric region of rank 0, flag 1 >= 1" in str(raised.value)


def test_after_an_error_every_later_call_raises() -> None:
    plan = flashcp.plan(LENGTHS, 2, "per_document")

    def program(rank: Rank) -> list[str]:
        cp = rank.operator(overlap="staged")
        said = []
        for _ in range(2):
            try:
                cp.attention(*rows_of(rank, cp, plan), plan)
                cp.synchronize()
            except RuntimeError as error:
                said.append(type(error).__name__)
        return said

    first, second = run_emulated(program, 2, 1, fabric=NeverSends, patient=True)
    assert first == ["ExchangeTimeoutError", "ExchangeError"]
    assert second == ["PeerFailedError", "ExchangeError"]


def test_a_rank_without_memory_is_named_on_all() -> None:
    def full(*arguments: Any) -> Memories:
        def empty(size: int, **_: Any) -> Tensor:
            raise RuntimeError("CUDA driver error: out of memory")

        symmetric, _, rank, *_ = arguments
        if rank == 1:
            symmetric.empty = empty
        return symmetric_memories(*arguments)

    def program(rank: Rank) -> str:
        cp = rank.operator()
        plan = flashcp.plan(LENGTHS, 2, "per_document")
        rows = rows_of(rank, cp, plan)
        with pytest.raises(HeapError) as raised:
            cp.attention(*rows, plan)
        return str(raised.value)

    for said in run_emulated(program, 2, 0, memories=full):
        assert said.startswith("rank 1: no 0 MiB for receive buffers on its GPU (CUDA driver error: out of memory)")


class Pool:
    """torch's symmetric memory with one block a rank, from which allocations are taken at places of the rank's own."""

    def __init__(self, rank: int, blocks: list[Tensor]) -> None:
        self.rank, self.blocks, self.world_size, self.used = rank, blocks, len(blocks), 512 * rank

    def empty(self, size: int, **_: Any) -> Tensor:
        begin, self.used = self.used, self.used + size
        return self.blocks[self.rank][begin : begin + size]

    def rendezvous(self, tensor: Tensor, group: object) -> Pool:
        return self

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype, storage_offset: int = 0) -> Tensor:
        return self.blocks[rank][storage_offset : storage_offset + sizes[0]].view(dtype)


def test_regions_of_one_block_are_apart() -> None:
    blocks, meet = [torch.ones(1 << 16, dtype=torch.uint8) for _ in range(2)], Barrier(2)
    said: list[bytes] = [b""] * 2
    device: Any = SimpleNamespace(synchronize=lambda: None)

    def regions(rank: int) -> list[Sequence[Tensor]]:
        def share(words: bytes) -> list[bytes]:
            said[rank] = words
            meet.wait(10)
            found = list(said)
            meet.wait(10)
            return found

        memories = symmetric_memories(Pool(rank, blocks), None, rank, device, torch.device("cpu"), share)  # type: ignore[arg-type]
        return [memories(index, 8192)[0] for index in range(3)]

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(regions, range(2))
    for index in range(3):
        for owner in range(2):
            place = blocks[owner].data_ptr() + 512 * owner + 8192 * index
            assert {first[index][owner].data_ptr(), second[index][owner].data_ptr()} == {place}
            assert not first[index][owner][:4096].any(), "flags that are not 0"


def test_a_pass_in_which_nobody_waits_leaves_the_next_one_right() -> None:
    """Kernels are loaded so, where ranks share a thread of the host."""

    def program(rank: Rank) -> float:
        fabric = rank.connection.transport.fabric  # type: ignore[attr-defined]
        for waiting in (False, True):
            fabric.waiting = waiting
            error = layers(Program(overlap="fused"), 3, rank)
        return error

    for seed in range(3):
        assert max(run_emulated(program, 2, seed)) < LIMIT


def test_ranks_that_came_apart_stay_apart() -> None:
    """Plans differ: every call after it raises on both, `synchronize` too."""

    def program(rank: Rank) -> list[str]:
        cp, said = rank.operator(), []
        plan = flashcp.plan(LENGTHS, 2, ("per_document", "per_sequence")[rank.rank])
        for call in (lambda: cp.attention(*rows_of(rank, cp, plan), plan), cp.synchronize, cp.synchronize):
            with pytest.raises(ExchangeError) as raised:
                call()
            said.append(type(raised.value).__name__)
        return said

    for said in run_emulated(program, 2, 0, patient=True):
        assert said == ["PlanMismatchError", "ExchangeError", "ExchangeError"]


def test_a_launch_that_awaits_nobody_is_given_no_flags() -> None:
    """Its inbox holds no rows, so nothing keeps the region until it runs."""

    def program(rank: Rank) -> None:
        cp = rank.operator(overlap="fused")
        alone = flashcp.ShardingPlan.from_shards([6, 6], 2, [(0, 0, 6, 0), (1, 0, 6, 1)])
        large = flashcp.plan((400,), 2, "per_document")
        with torch.no_grad():
            q, k, v = rows_of(rank, cp, alone)
            handle = cp.prefetch(k, v, alone)
            cp.synchronize()
            other = cp.prefetch(*rows_of(rank, cp, large)[1:], large)
            handle.attention(q)
            del other
        cp.synchronize()

    run_until_fault(program, 6)


def test_capture_is_refused_at_once() -> None:
    def program(rank: Rank) -> str:
        cp = rank.operator()
        plan = flashcp.plan(LENGTHS, 2, "per_document")
        rows = rows_of(rank, cp, plan)
        rank.device.capturing = True
        with pytest.raises(RuntimeError, match=r"CUDA graph capture.*expected transport='nccl'") as raised:
            cp.attention(*rows, plan)
        rank.device.capturing = False
        return str(raised.value)

    assert run_emulated(program, 2, 0)[0].startswith("transport='cuda_symmetric' under CUDA graph capture: ")


def test_auto_is_staged_with_kernels_that_could_wait() -> None:
    def program(rank: Rank) -> tuple[str, str]:
        return rank.operator(attention="triton").overlap, rank.operator(attention="triton", overlap="fused").overlap

    assert run_emulated(program, 2, 0) == [("staged", "fused")] * 2


def test_rows_are_packed_on_the_stream_that_made_them() -> None:
    seen: list[str] = []
    packed = OutgoingRows.packed

    def program(rank: Rank) -> None:
        cp = rank.operator()
        plan = flashcp.plan(LENGTHS, 2, "per_document")

        def look(rows: OutgoingRows) -> Tensor:
            seen.append(rank.device.current_stream().name)
            return packed(rows)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(OutgoingRows, "packed", look)
            cp.attention(*rows_of(rank, cp, plan), plan)

    run_emulated(program, 2, 0)
    assert set(seen) == {"compute"}


def test_the_emulation_leaves_nothing_running() -> None:
    import threading

    before = threading.active_count()
    with suppress(DeadlockError):
        run_emulated(lambda rank: layers(Program(layers=1), 0, rank), 2, 0, fabric=NeverSends)
    gc.collect()
    assert threading.active_count() == before
