"""Prices: tiles counted against a loop over tiles, times and collectives against hand calculations."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from flashcp.simulator.cost import AttentionCost, AttentionShape, KernelCost, Link, Links, read_features

SHAPE = AttentionShape(query_heads=4, kv_heads=2, head_dim=16, dtype_bytes=2)


def count_tiles(queries: int, keys: int, tiles: tuple[int, int], masked: bool) -> tuple[int, int]:
    """Pairs in tiles without and with a mask, tile by tile."""
    full = with_mask = 0
    for q in range(0, queries, tiles[0]):
        for k in range(0, queries if masked else keys, tiles[1]):
            if masked and k >= q + tiles[0]:
                continue
            if masked and k + tiles[1] > q:
                with_mask += tiles[0] * tiles[1]
            else:
                full += tiles[0] * tiles[1]
    return full, with_mask


@pytest.mark.parametrize("tiles", [(128, 64), (128, 128), (16, 1)], ids=str)
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 127, 128, 129, 1000])
def test_tiles_are_counted_as_a_loop_would(rows: int, tiles: tuple[int, int]) -> None:
    own = read_features(np.array([rows]), np.array([rows]), tiles, masked=True)
    assert (own.full_pairs[0], own.masked_pairs[0]) == count_tiles(rows, rows, tiles, masked=True)
    read = read_features(np.array([rows]), np.array([300]), tiles)
    assert (read.full_pairs[0], read.masked_pairs[0]) == count_tiles(rows, 300, tiles, masked=False)


def test_a_range_without_rows_costs_nothing() -> None:
    cost = AttentionCost(*(KernelCost(100, 100, 100, merge_gbps=10, range_us=3, launch_us=7),) * 2)
    reads = read_features(np.array([[50], [50]]), np.array([[0, 10], [0, 0]]), cost.tiles)
    assert (cost.read_us(reads, SHAPE) > 0).tolist() == [[False, True], [False, False]]


def test_time_of_a_read_by_hand() -> None:
    forward = KernelCost(tflops=2, kv_gbps=5, query_gbps=4, masked=3, merge_gbps=8, range_us=11)
    cost = AttentionCost(forward, forward, tile_queries=64, tile_keys=64)
    (own,) = cost.read_us(read_features(np.array([100]), np.array([100]), cost.tiles, masked=True), SHAPE)
    operations = 4 * SHAPE.head_dim * SHAPE.query_heads * (64 * 64 + 3 * 2 * 64 * 64) / 2e6
    moved = 100 * SHAPE.kv_bytes / 5e3 + 100 * SHAPE.query_bytes / 8e3
    assert own == pytest.approx(operations + moved + 11)
    (back,) = cost.read_us(read_features(np.array([100]), np.array([100]), cost.tiles, masked=True), SHAPE, True)
    assert back == pytest.approx(2.5 * operations + 2 * moved + 11)
    assert cost.query_us(np.array([100]), SHAPE)[0] == pytest.approx(100 * SHAPE.query_bytes / 4e3)


def test_short_queries_are_dear() -> None:
    """Sixteen shards of 512 rows with half the work each cost more than one kernel over the documents whole."""
    cost = AttentionCost(KernelCost(385, 3350, 3350), KernelCost(334, 3350, 3350))
    whole = read_features(np.array([8192]), np.array([8192]), cost.tiles, masked=True)
    starts = np.arange(0, 8192, 512)
    prefixes = read_features(np.full(16, 512), starts, cost.tiles)
    pieces = read_features(np.full(16, 512), starts, cost.tiles, masked=True)
    cut = cost.read_us(prefixes, AttentionShape()).sum() + cost.read_us(pieces, AttentionShape()).sum()
    assert 1.1 < cut / cost.read_us(whole, AttentionShape())[0] < 1.3


def test_collectives_by_hand() -> None:
    links = Links(ranks_per_node=4, node=Link(100, 1), network=Link(10, 5))
    assert links.collective_us(1e6, 1) == 0
    assert links.collective_us(1e6, 4) == pytest.approx(3 * (10 + 1))
    assert links.collective_us(1e6, 8) == pytest.approx(7 * (25 + 5))  # four rings over four network ports
    assert links.all_to_all_us(1e6, 4) == pytest.approx(30 + 1)
    assert links.all_to_all_us(1e6, 8) == pytest.approx(400 + 5)  # four ranks of the other node through one port
    assert links.all_to_all_us(1e6, 6) == pytest.approx(400 + 5)  # the last node has two ranks, with four far ones each
    one_port = dataclasses.replace(links, shared_port=True)
    assert one_port.collective_us(1e6, 8) == pytest.approx(7 * (100 + 5))  # one ring over the node's port
    assert one_port.all_to_all_us(1e6, 8) == pytest.approx(1600 + 5)  # four ranks' messages to four of the other node
    assert one_port.all_to_all_us(1e6, 6) == pytest.approx(800 + 5)
    assert one_port.all_to_all_us(1e6, 4) == links.all_to_all_us(1e6, 4)
    rate, latency = links.neighbour(8)
    assert rate.tolist() == [1e4, 1e5, 1e5, 1e5, 1e4, 1e5, 1e5, 1e5]
    assert latency.tolist() == [5, 1, 1, 1, 5, 1, 1, 1]
