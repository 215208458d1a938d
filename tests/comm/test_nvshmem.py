"""The NVSHMEM transport without a GPU: its operator is played on memory that processes share, delays and all."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import flashcp
from flashcp.comm import choice
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.comm.fabrics.memory import shared_memories
from flashcp.comm.mail import Mail
from flashcp.comm.nvshmem import Nvshmem, grain_bytes
from flashcp.comm.transport import OutgoingRows
from flashcp.comm.waits import StreamWaits
from tests.like_nccl import like_nccl
from tests.packs import random_lengths, random_qkv, relative_error
from tests.ranks import run_cases, run_ranks


class Done:
    def wait(self) -> None:
        """The host ran it."""


class Played(Nvshmem):
    """As on a GPU, but for the operator: it follows the steps of `all_to_all_vdev`, each rank at its own pace.

    exchanges: (place, whether rows went through the operator) of each one. uploads: splits that were made.
    """

    def _open(self) -> None:
        self._share = shared_memories(self.rank, Mail(self.group, 10).share)
        self._seen: dict[int, list[np.ndarray]] = {}
        self._draw = random.Random(self.rank)
        self.exchanges: list[int] = []

    def _memory(self, size: int) -> Tensor:
        memories = self._share(0, size)
        own = torch.from_numpy(memories[self.rank])
        self._seen[own.data_ptr()] = memories
        return own

    @contextmanager
    def _beside(self) -> Iterator[None]:
        yield

    def _mark(self) -> Done:
        return Done()

    def _exchange(self, turn: int, arrived: Tensor) -> None:
        self.exchanges.append(turn)
        ranks, own = self.world_size, self.rank
        sources = self._seen[self._leaving[turn].data_ptr()]
        counts = [memory.view(np.int64) for memory in self._seen[self._splits_there[turn].data_ptr()]]
        offset = 0
        for to, size in enumerate(self._splits[turn].tolist()):
            counts[to][own], counts[to][ranks + own] = size, offset
            offset += size
        dist.barrier(self.group)
        into = arrived.numpy()
        start = 0
        for source in range(ranks):
            time.sleep(self._draw.choice([0, 0, 0.004]))
            size, at = int(counts[own][source]), int(counts[own][ranks + source])
            for blocks in (64, 16):
                assert size % max(1, blocks // ranks) == 0, "the device would assert"
            into[start : start + size] = sources[source][at : at + size]
            start += size


@contextmanager
def played() -> Iterator[None]:
    """`transport="nvshmem"` on a CPU."""
    device = torch.device("cpu")
    with (
        like_nccl(),
        patch.object(choice, "Nvshmem", lambda group, timeout_s, _: Played(group, timeout_s, device)),
        patch.object(torch.cuda, "current_device", lambda: 0),
    ):
        yield


def layers(exchange: str, overlap: str, backward: str) -> tuple[float, list[int], int]:
    """The largest error over layers and steps, the places of all exchanges, and how many splits were made."""
    worst = 0.0
    with played():
        cp = flashcp.ContextParallel(
            exchange=exchange, overlap=overlap, backward=backward, transport="nvshmem", timeout_s=30
        )
        transport = cp._transport
        assert isinstance(transport, Played)
        assert isinstance(transport.waits, StreamWaits)
        for step in range(3):
            lengths = random_lengths(step % 2, 20)
            plan = flashcp.plan(lengths, cp.world_size, "per_document")
            for layer in range(2):
                q, k, v, grad = random_qkv(sum(lengths), 12, 12, 16, torch.float32, 10 * step + layer)
                local = [cp.shard(x, plan).requires_grad_() for x in (q, k, v)]
                out = cp.attention(*local, plan)
                found = (out.detach(), *torch.autograd.grad(out, local, cp.shard(grad, plan)))
                whole = [x.double().requires_grad_() for x in (q, k, v)]
                reference = flashcp.reference_attention(*whole, lengths)
                expected = (reference.detach(), *torch.autograd.grad(reference, whole, grad.double()))
                worst = max(
                    worst, *(relative_error(a, cp.shard(b, plan)) for a, b in zip(found, expected, strict=True))
                )
        transport.synchronize()
    return worst, transport.exchanges, transport._splits_of.cache_info().misses


@pytest.mark.parametrize("ranks", [2, 4])
def test_exchanges_over_the_operator_give_the_reference(ranks: int) -> None:
    cases = [(exchange, overlap, "keep") for exchange in EXCHANGE_CLASSES for overlap in ("none", "staged")]
    cases.append(("exact", "staged", "refetch"))
    for case, answers in zip(cases, run_cases(layers, ranks, cases), strict=True):
        for error, places, uploads in answers:
            assert error < 1e-5, case
            assert places == [i % 2 for i in range(len(places))], "two that follow each other share no memory"
            assert len(places) >= 12
            assert uploads <= len(places) / 3, "splits of a plan are made once"  # the first plan comes twice


def follow_each_other(one_place: bool) -> bool:
    """Many exchanges without a pause in between, of ranks that are not equally fast: whether all rows were right."""
    right = True
    with played():
        transport = Played(None, 10.0, torch.device("cpu"))
        rank, ranks = transport.rank, transport.world_size
        for i in range(60):
            if one_place:
                transport._turn = 0
            mine = torch.full((2 * ranks, 256), 1000.0 * i + rank)
            inbox = transport.inbox(2 * ranks, 2 * ranks, (256,), mine)
            transport.all_to_all(OutgoingRows(mine), [2] * ranks, inbox, [2] * ranks, [0] * ranks).wait()
            expected = (1000.0 * i + torch.arange(ranks)).repeat_interleave(2)
            right &= torch.equal(inbox.rows[:, 0], expected) and torch.equal(inbox.rows[:, -1], expected)
        assert len(transport.exchanges) == 60
    return right


def test_a_fast_rank_disturbs_no_slow_one() -> None:
    assert run_ranks(follow_each_other, 4, False) == [True] * 4
    assert False in run_ranks(follow_each_other, 4, True), (
        "with one place this test would see rows of the next exchange"
    )


def uneven_rows() -> tuple[bool, list[int], list[str]]:
    """Rows that do not divide into pieces, and rows that do: right, exchanges over the operator, over NCCL."""
    with played(), like_nccl() as seen:
        transport = Played(None, 10.0, torch.device("cpu"))
        rank, ranks = transport.rank, transport.world_size
        right = True
        for width in (1, 256):
            block = torch.full((3, width), float(rank))
            inbox = transport.inbox(3 * ranks, 3 * ranks, (width,), block)
            transport.all_gather(OutgoingRows(block), inbox).wait()
            right &= torch.equal(inbox.rows[:, 0], torch.arange(ranks).repeat_interleave(3).float())
    return right, transport.exchanges, seen.operations


def test_rows_that_the_operator_cannot_cut_take_nccl() -> None:
    assert run_ranks(uneven_rows, 2) == [(True, [0], ["all_to_all_single"])] * 2


@pytest.mark.parametrize(("ranks", "grain"), [(1, 64), (2, 32), (3, 210), (4, 16), (8, 8), (16, 4), (64, 1), (128, 1)])
def test_the_grain_divides_into_the_pieces_of_any_version(ranks: int, grain: int) -> None:
    assert grain_bytes(ranks) == grain


def grown() -> tuple[list[int], bool]:
    """Sizes of the buffers as larger exchanges come, and whether rows are right behind each growth."""
    sizes, right = [], True
    with played():
        transport = Played(None, 10.0, torch.device("cpu"))
        rank, ranks = transport.rank, transport.world_size
        for rows in (1, 1 << 12, 1 << 13, (1 << 13) + 1, 5):
            block = torch.full((rows, 64), float(rank))
            inbox = transport.inbox(rows * ranks, rows * ranks, (64,), block)
            transport.all_gather(OutgoingRows(block), inbox).wait()
            right &= torch.equal(inbox.rows[:, 5], torch.arange(ranks).repeat_interleave(rows).float())
            sizes.append(len(transport._arrived))
    return sizes, right


def test_buffers_grow_together() -> None:
    first, second = run_ranks(grown, 2)
    assert first == second
    sizes, right = first
    assert right
    least = 1 << 22
    assert sizes == [least, least, least, least * 5 // 4, least * 5 // 4]


def a_part_of_the_job() -> str:
    group = dist.new_group([0, 1])
    if dist.get_rank() == 2:
        return ""
    with pytest.raises(ValueError, match="expected a group of all ranks") as raised:
        Played(group, 1.0, torch.device("cpu"))
    return str(raised.value)


def test_a_group_that_is_not_all_ranks_is_refused() -> None:
    assert run_ranks(a_part_of_the_job, 3)[0].startswith("transport='nvshmem' over 2 of 3 ranks: ")
