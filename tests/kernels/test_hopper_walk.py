"""Which rows the forward on Hopper reads: its own functions over the tables, on numpy instead of a GPU.

`_tile`, `_range` and `_count` are the kernel's, run as Python on arrays; what surrounds them in `_fetch` and `_attend`
is walked here beside them. Nothing is imported from `kernels/tiles.py` but what makes the tables: a wrong stride, index
or width in the kernel changes what is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

import flashcp
from flashcp.experiments.bench.attention_cases import all_cases
from flashcp.kernels import hopper
from flashcp.kernels.launch import HOPPER_ROWS
from flashcp.kernels.schedule import Schedule, build_schedule, whole_pack_schedule
from flashcp.kernels.tiles import Tiles, query_tiles
from tests.packs import AWKWARD, random_lengths

BLOCK_N = hopper.BLOCK_N
TILE_ROWS = HOPPER_ROWS
LOCAL, RECEIVED, OWN = 0, 1, 2


class Pointer(NamedTuple):
    """An array and where in it, as a kernel's pointers count."""

    array: np.ndarray
    at: Any = 0

    def __add__(self, offset: Any) -> Pointer:  # type: ignore[override]
        return Pointer(self.array, self.at + getattr(offset, "value", offset))


def load(pointer: Pointer) -> Any:
    return pointer.array[pointer.at]


def where(condition: Any, yes: Any, no: Any) -> Any:
    return np.where(getattr(condition, "value", condition), yes, no)


@pytest.fixture(autouse=True)
def on_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's functions and widths as Python's."""
    for name in ("_tile", "_range", "_count"):
        monkeypatch.setattr(hopper, name, getattr(hopper, name).fn)
    for name in ("TILE_COLUMNS", "RANGE_COLUMNS", "OWN", "RECEIVED"):
        monkeypatch.setattr(hopper, name, getattr(hopper, name).value)
    monkeypatch.setattr(hopper, "gl", SimpleNamespace(load=load, where=where, constexpr=int))


class Block(NamedTuple):
    """A block of keys as one side takes it: where, from which key, the end of its range, whether rows are masked."""

    place: int
    n: int
    end: int
    masked: bool


def fetched(ranges: Pointer, tile: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """The blocks that the copying warpgroup brings: (place, first key, end of the range)."""
    blocks = []
    for i in range(tile[2], tile[3]):
        place, start, end, _ = hopper._range(ranges, i, tile)
        blocks += [(int(place), n, int(end)) for n in range(int(start), int(end), BLOCK_N)]
    return blocks


def attended(ranges: Pointer, tile: tuple[int, ...], count: int) -> Iterator[Block]:
    """The blocks that an attending warpgroup computes on; the first one always masked."""
    i = tile[2]
    place, n, end, seen_by_all = hopper._range(ranges, i, tile)
    for block in range(count):
        if block:
            n += BLOCK_N
            if n >= end:
                i += 1
                place, n, end, seen_by_all = hopper._range(ranges, i, tile)
        yield Block(int(place), int(n), int(end), block == 0 or bool(n + BLOCK_N > seen_by_all))


def walk(tiles: Tiles) -> Iterator[tuple[tuple[int, ...], list[Block]]]:
    """Each tile and its blocks; both sides must take the same ones, and each tile at least one."""
    table, ranges = Pointer(tiles.table.reshape(-1)), Pointer(tiles.ranges.reshape(-1))
    for index in range(len(tiles.table)):
        tile = tuple(map(int, hopper._tile(table, index)))
        count = int(hopper._count(ranges, tile, BLOCK_N))
        assert count > 0, "a tile that waits for its first block for ever"
        blocks = list(attended(ranges, tile, count))
        assert [block[:3] for block in blocks] == fetched(ranges, tile)
        yield tile, blocks


def seen(tiles: Tiles, rows: int, received_rows: int) -> np.ndarray:
    """How often each query row [T] meets each key, local ones first [T + R], by the rules of `_mask`."""
    count = np.zeros((rows, rows + received_rows), dtype=int)
    for (row, stop, _, _), blocks in walk(tiles):
        query = np.arange(row, stop)[:, None]
        lowest = tiles.reach[row:stop, None]
        for block in blocks:
            keys = np.arange(block.n, min(block.n + BLOCK_N, block.end))
            meets = np.ones((stop - row, len(keys)), dtype=bool)
            if block.masked and block.place == OWN:
                meets = (keys >= lowest) & (keys <= query)
            elif not block.masked:
                assert block.n + BLOCK_N <= block.end, "rows beyond the range, and no mask"
            count[row:stop, keys + rows * (block.place == RECEIVED)] += meets
    return count


def wanted(schedule: Schedule, rows: int, received_rows: int) -> np.ndarray:
    """As `seen`, from the schedule's own ranges."""
    count = np.zeros((rows, rows + received_rows), dtype=int)
    for shard, (start, stop) in enumerate(zip(schedule.query_start, schedule.query_stop, strict=True)):
        for r in range(schedule.range_first[shard], schedule.range_first[shard + 1]):
            keys = np.arange(schedule.row_start[r], schedule.row_stop[r])
            meets = np.ones((stop - start, len(keys)), dtype=bool)
            if schedule.masked[r]:
                meets = np.tri(stop - start, dtype=bool)
            count[start:stop, keys + rows * schedule.received[r]] += meets
    return count


def compare(schedule: Schedule, rows: int, received_rows: int) -> int:
    tiles = query_tiles(schedule, rows, TILE_ROWS)
    assert np.array_equal(seen(tiles, rows, received_rows), wanted(schedule, rows, received_rows))
    return len(tiles.table)


PACKS = [
    *AWKWARD,
    (300, 200, 500),
    (1000,),
    (129, 127, 1, 640),
    (3,) * 200,
    (5, 700, 5),
    *map(random_lengths, range(6)),
]


@pytest.mark.parametrize("lengths", [pack for pack in PACKS if sum(pack) <= 3000], ids=lambda pack: str(pack)[:30])
def test_packs_are_read_as_the_schedule_says(lengths: tuple[int, ...]) -> None:
    assert compare(whole_pack_schedule(np.array(lengths)), sum(lengths), 0) > 0


@pytest.mark.parametrize("exchange", ["exact", "all_gather"])
@pytest.mark.parametrize("strategy", flashcp.strategies())
def test_shares_of_ranks_are_read_as_the_schedule_says(strategy: str, exchange: str) -> None:
    compared = 0
    for lengths in ((700, 30, 1, 400, 269), (1400,), random_lengths(3)):
        plan = flashcp.plan(lengths, 4, strategy)
        for rank in range(4):
            local, received = plan.local(rank), plan.route(exchange).received(rank)
            size = int(received.buffer_rows().max(initial=-1)) + 1
            schedule = build_schedule(local, local=local, received=received)
            compared += compare(schedule, int(plan.tokens[rank]), size)
    assert compared > 20


@pytest.mark.parametrize("case", [case for case in all_cases() if case.kv_heads == 32], ids=lambda case: case.name)
def test_the_benchmark_counts_as_many_pairs(case: Any) -> None:
    """Too large for each pair: all tiles at once. Every range ends behind its start and lies inside its tensor, every
    tile has a block, and the pairs are the schedule's."""
    tiles = query_tiles(case.schedule, case.rows, TILE_ROWS)
    table, ranges = Pointer(tiles.table.reshape(-1)), Pointer(tiles.ranges.reshape(-1))
    row, stop, first, last = hopper._tile(table, np.arange(len(tiles.table)))
    tile = np.repeat(np.arange(len(row)), last - first)
    i = np.arange(len(tile)) - np.repeat(np.cumsum(last - first) - (last - first), last - first) + first[tile]
    place, start, end, seen_by_all = hopper._range(ranges, i, (row[tile], stop[tile], first[tile], last[tile]))
    assert set(place.tolist()) <= {LOCAL, RECEIVED, OWN}
    assert (start < end).all()
    assert (start >= 0).all()
    assert (end <= np.where(place == RECEIVED, case.received_rows, case.rows)).all()
    blocks = np.bincount(tile, -(-(end - start) // BLOCK_N), len(row))
    assert (blocks > 0).all()
    for index in (0, len(row) // 2, len(row) - 1):
        one = tuple(map(int, (row[index], stop[index], first[index], last[index])))
        assert hopper._count(ranges, one, BLOCK_N) == blocks[index]
    own = place == OWN
    assert np.array_equal(seen_by_all, np.where(own, row[tile], end))
    read = np.where(own, 0, (end - start) * (stop - row)[tile]).sum()
    # Rows of a tile that lies on its own run see it from where it begins for each of them.
    runs = np.concatenate([np.arange(row[t], stop[t]) for t in tile[own]])
    assert read + (runs - tiles.reach[runs] + 1).sum() == case.schedule.pairs
