"""The symmetric heap: which region an exchange gets, when it is taken again, what it refuses."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from flashcp.comm.errors import HeapError
from flashcp.comm.fabrics.memory import FOLDER, shared_memories
from flashcp.comm.fabrics.shm import ShmFabric
from flashcp.comm.heap import MIB, SymmetricHeap
from flashcp.comm.one_sided import OneSided

LIKE = torch.zeros(0, dtype=torch.float32)


class Ranks:
    """One rank's heap, and what the other ranks say of theirs."""

    def __init__(self, **limits: int) -> None:
        self.oldest, self.settled = 0, 0
        fabric = ShmFabric(0, 1, shared_memories(0, lambda words: [words]), timeout_s=5)
        self.heap = SymmetricHeap(fabric, lambda: self.oldest, self.settle, **limits)
        self.transport = OneSided(fabric, self.heap)

    def settle(self) -> None:
        self.settled += 1

    def inbox(self, rows: int = 1024):  # type: ignore[no-untyped-def]
        return self.transport.inbox(rows, rows, (1,), LIKE)

    def region(self, ticket: int) -> int:
        lease = self.heap.find(ticket)
        assert lease is not None
        return lease.region.index


def test_freed_regions_alternate_and_kept_ones_pile_up() -> None:
    ranks, used = Ranks(), []
    for _ in range(6):
        inbox = ranks.inbox()
        used.append(ranks.region(inbox.ticket))
        ranks.transport.free(inbox.ticket)
    assert used == [1, 2, 1, 2, 1, 2]
    kept = [ranks.inbox() for _ in range(4)]
    assert len({ranks.region(inbox.ticket) for inbox in kept}) == 4
    assert len(ranks.heap.regions) == 4
    assert ranks.transport.receive_bytes == sum(r.data_bytes for r in ranks.heap.regions.values())


def test_growing_compares_headers_first_and_replaces_what_is_too_small() -> None:
    ranks = Ranks()
    for rows in (1024, 1024, 4096, 4096, 4096):
        ranks.transport.free(ranks.inbox(rows).ticket)
    assert ranks.settled == 4
    assert sorted(region.data_bytes for region in ranks.heap.regions.values()) == [16384, 16384]


def test_a_region_holds_a_little_more_than_was_asked_and_at_least_the_start() -> None:
    for rows in (1, 1000, 123_457, 10_000_000):
        ranks = Ranks()
        ranks.inbox(rows)
        assert 4 * rows <= ranks.transport.receive_bytes <= max(4096, 4.5 * rows)
    ranks = Ranks(start_bytes=MIB)
    ranks.inbox(1)
    assert ranks.transport.receive_bytes == MIB


def test_memory_nobody_reads_is_taken_again_once_all_ranks_say_so() -> None:
    ranks = Ranks()
    inbox = ranks.inbox()
    view, first, ticket = inbox.rows[3:5], ranks.region(inbox.ticket), inbox.ticket
    assert ranks.transport.oldest == ticket
    del inbox
    assert ranks.transport.oldest == ticket, "a view still reads it"
    del view
    assert ranks.transport.oldest == ticket + 1
    taken = [ranks.inbox() for _ in range(2)]  # no rank has said anything
    assert first not in {ranks.region(each.ticket) for each in taken}
    ranks.oldest = ticket + 1
    assert ranks.region(ranks.inbox().ticket) == first
    assert not ranks.transport.is_open(ticket)


def test_rows_of_every_dtype_and_none_at_all() -> None:
    ranks = Ranks()
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64):
        inbox = ranks.transport.inbox(5, 7, (2, 3, 4), torch.zeros(0, dtype=dtype))
        assert (inbox.rows.shape, inbox.rows.dtype) == ((5, 2, 3, 4), dtype)
        inbox.rows.fill_(1)
    empty = ranks.transport.inbox(0, 7, (2, 3, 4), LIKE)
    assert empty.rows.shape == (0, 2, 3, 4)


def test_the_limit_says_how_much_is_missing_and_what_gives_it() -> None:
    ranks = Ranks(limit_bytes=3 * MIB)
    first = ranks.inbox(MIB // 2)
    with pytest.raises(HeapError, match=r"need 4 MiB on every rank, 1 MiB more than heap_mib=3: .*refetch"):
        ranks.inbox(MIB // 2)
    ranks.transport.free(first.ticket)
    assert ranks.transport.receive_bytes == 2 * MIB


def test_a_full_file_system_is_an_error_and_leaves_nothing() -> None:
    gc.collect()
    before = descriptors()
    full = patch("os.posix_fallocate", side_effect=OSError(28, "No space left on device"))
    with (
        full,
        pytest.raises(
            HeapError,
            match=r"rank 0: no shared memory in /dev/shm; transport='gloo' needs none, .*--shm-size \(No space left",
        ),
    ):
        Ranks().inbox()
    gc.collect()
    ranks = Ranks()
    inbox = ranks.inbox()
    mapped = mappings()
    del inbox, ranks
    gc.collect()
    assert mappings() == mapped - 1, "memory that nobody uses is given back"
    assert descriptors() == before


def test_memory_never_has_a_name_that_a_killed_rank_would_leave() -> None:
    names, allocate = [], os.posix_fallocate

    def look(descriptor: int, start: int, size: int) -> None:
        allocate(descriptor, start, size)
        names.append(os.fstat(descriptor).st_nlink)

    with patch("os.posix_fallocate", look):
        Ranks().inbox()
    assert names == [0]


def mappings() -> int:
    """Of this process, of files in shared memory that have no name."""
    return Path("/proc/self/maps").read_text().count(f"{FOLDER}/#")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
