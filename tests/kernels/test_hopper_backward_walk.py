"""Which pairs the backward on Hopper computes: its own functions over the tables, on numpy instead of a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import flashcp
from flashcp.kernels import hopper_backward
from flashcp.kernels.schedule import Schedule, whole_pack_schedule
from flashcp.kernels.tiles import Tiles, key_tiles
from tests.kernels.one_rank import Rank
from tests.kernels.test_hopper_walk import Pointer, load, wanted, where
from tests.packs import AWKWARD, random_lengths, random_qkv

BLOCK_M, BLOCK_N, GROUP = hopper_backward.BLOCK_M, hopper_backward.BLOCK_N, 2
KV_HEAD = 3


@pytest.fixture(autouse=True)
def on_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's functions and widths as Python's."""
    for name in ("_tile", "_readers", "_count", "_mask"):
        monkeypatch.setattr(hopper_backward, name, getattr(hopper_backward, name).fn)
    for name in ("TILE_COLUMNS", "RANGE_COLUMNS", "OWN"):
        monkeypatch.setattr(hopper_backward, name, getattr(hopper_backward, name).value)
    numpy = SimpleNamespace(
        load=load,
        where=where,
        constexpr=int,
        minimum=np.minimum,
        arange=lambda start, stop, layout: np.arange(start, stop),
        SliceLayout=lambda *_: None,
    )
    monkeypatch.setattr(hopper_backward, "gl", numpy)


class Scores(np.ndarray):
    """Scores as `_mask` takes them."""

    type = SimpleNamespace(layout=None)


def seen(tiles: Tiles, rows: int, received_rows: int) -> np.ndarray:
    """How often each query row [T] meets each key, local ones first [T + R], of each of a KV head's query heads."""
    count = np.zeros((GROUP, rows, rows + received_rows), dtype=int)
    table, ranges = Pointer(tiles.table.reshape(-1)), Pointer(tiles.ranges.reshape(-1))
    for index in range(len(tiles.table)):
        tile = tuple(map(int, hopper_backward._tile(table, index)))
        received, row, stop, first, last = tile
        blocks = int(hopper_backward._count(ranges, tile, KV_HEAD, BLOCK_M, GROUP))
        assert blocks > 0, "a tile that waits for its first block for ever"
        keys = np.arange(row, row + BLOCK_N)
        past = np.zeros(BLOCK_N, dtype=int)
        there = keys < stop
        if not received:
            past[there] = tiles.reach[keys[there]]
        j = 0
        own, m, end, head = hopper_backward._readers(ranges, 0, tile, KV_HEAD, GROUP)
        m = m - BLOCK_M
        for _ in range(blocks):
            m = m + BLOCK_M
            if m >= end:
                j += 1
                own, m, end, head = hopper_backward._readers(ranges, j, tile, KV_HEAD, GROUP)
            scores = np.zeros((BLOCK_N, BLOCK_M))
            if stop - row < BLOCK_N or (own and m < stop) or m + BLOCK_M > end:
                scores = hopper_backward._mask(scores.view(Scores), own, m, end, stop, keys, past)
            meets = np.isfinite(scores)
            assert not meets[~there].any(), "keys beyond the tile count"
            assert 0 <= head - KV_HEAD * GROUP < GROUP
            queries = np.arange(m, min(m + BLOCK_M, end))
            assert not meets[:, len(queries) :].any(), "queries beyond the range count"
            columns = keys[there] + rows * received
            count[int(head) - KV_HEAD * GROUP, queries[:, None], columns] += meets[there][:, : len(queries)].T
        assert j == GROUP * (last - first) - 1, "ranges that no block is of"
    return count


def check(schedule: Schedule, rows: int, received_rows: int) -> None:
    """The long part by the kernel and the lone short documents together are the schedule, once each."""
    lone = schedule.lone(BLOCK_N // 2)
    total = np.zeros((GROUP, rows, rows + received_rows), dtype=int)
    if not lone.all():
        tiles = key_tiles(schedule.take(~lone), rows, BLOCK_N, share=False)
        assert not tiles.shared
        total += seen(tiles, rows, received_rows)
    if lone.any():
        total += wanted(schedule.take(lone), rows, received_rows)
    assert (total == wanted(schedule, rows, received_rows)).all()


@pytest.mark.parametrize("lengths", [*AWKWARD, (300, 64, 65, 129, 20, 20), (5,) * 30], ids=str)
def test_a_pack_on_one_device(lengths: tuple[int, ...]) -> None:
    check(whole_pack_schedule(np.array(lengths)), sum(lengths), 0)


@pytest.mark.parametrize("strategy", ["per_document", "flashcp", "per_sequence"])
@pytest.mark.parametrize("seed", range(4))
def test_a_rank_and_what_others_sent_it(strategy: str, seed: int) -> None:
    lengths = (*random_lengths(seed), 700, 64, *random_lengths(seed + 10))
    plan = flashcp.plan(lengths, 3, strategy)
    *qkv, grad = random_qkv(sum(lengths), 2, 1, 16, torch.float32, seed)
    for rank in range(3):
        state = Rank(plan, "exact", rank, qkv, grad)
        check(state.whole, len(state.q), len(state.buffer))


def test_lone_documents_are_those_that_nobody_else_reads() -> None:
    """A short shard is not lone where it reads others' rows or a later shard on the same rank reads its own."""
    lengths = (40, 90, 30)
    assert whole_pack_schedule(np.array(lengths)).lone(64).tolist() == [True, False, True]
    plan = flashcp.plan((60, 400), 2, "per_document")
    *qkv, grad = random_qkv(460, 2, 1, 16, torch.float32, 0)
    for rank in range(2):
        assert not Rank(plan, "exact", rank, qkv, grad).whole.lone(10_000).any()
