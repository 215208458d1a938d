"""Transfers that share ports: hand-made cases, bounds no schedule can beat, the compiled loop against the plain one."""

from __future__ import annotations

import numpy as np
import pytest

from flashcp.simulator import flows
from flashcp.simulator.cost import Link, Links
from flashcp.simulator.flows import carry_all

NODE = Links(ranks_per_node=8, node=Link(gbps=1, latency_us=2), network=Link(gbps=0.1, latency_us=5))  # 1e3 bytes/us


def matrix(ranks: int, moved: dict[tuple[int, int], float]) -> np.ndarray:
    whole = np.zeros((ranks, ranks))
    for pair, count in moved.items():
        whole[pair] = count
    return whole


def start(ranks: int) -> np.ndarray:
    return np.zeros((ranks, ranks))


def test_one_transfer_takes_its_bytes_and_the_latency() -> None:
    arrived = carry_all(matrix(2, {(0, 1): 5e3}), NODE, pull=True, release_us=start(2))
    assert arrived.tolist() == [[0, 7], [0, 0]]


@pytest.mark.parametrize("pull", [True, False])
def test_a_port_is_shared_evenly(pull: bool) -> None:
    into_two = carry_all(matrix(3, {(0, 2): 4e3, (1, 2): 1e3}), NODE, pull=pull, release_us=start(3))
    assert (into_two[1, 2], into_two[0, 2]) == (2 + 2, 5 + 2)
    out_of_one = carry_all(matrix(3, {(2, 0): 4e3, (2, 1): 1e3}), NODE, pull=pull, release_us=start(3))
    assert (out_of_one[2, 1], out_of_one[2, 0]) == (2 + 2, 5 + 2)


def test_a_switch_that_makes_the_copies_takes_the_load_off_the_sender() -> None:
    links = Links(8, NODE.node, NODE.network, multicast=True)
    arrived = carry_all(matrix(3, {(2, 0): 4e3, (2, 1): 4e3}), links, pull=True, release_us=start(3))
    assert arrived[2].tolist() == [6, 6, 0]


def test_a_transfer_waits_for_its_release() -> None:
    release = matrix(3, {(0, 2): 10.0})
    arrived = carry_all(matrix(3, {(0, 2): 1e3, (1, 2): 1e3}), NODE, pull=True, release_us=release)
    assert (arrived[1, 2], arrived[0, 2]) == (1 + 2, 11 + 2)


def test_levels_have_ports_of_their_own() -> None:
    links = Links(2, NODE.node, NODE.network)
    arrived = carry_all(matrix(4, {(0, 1): 1e3, (2, 1): 1e3}), links, pull=True, release_us=start(4))
    assert (arrived[0, 1], arrived[2, 1]) == (1 + 2, 10 + 5)


def test_ranks_of_a_node_share_its_port() -> None:
    moved = matrix(6, {(0, 2): 1e3, (1, 4): 1e3, (3, 2): 1e3})
    alone = carry_all(moved, Links(2, NODE.node, NODE.network), pull=True, release_us=start(6))
    shared = carry_all(moved, Links(2, NODE.node, NODE.network, shared_port=True), pull=True, release_us=start(6))
    assert alone[0, 2] == alone[1, 4] == 10 + 5
    assert shared[0, 2] == shared[1, 4] == 20 + 5
    assert shared[3, 2] == 1 + 2


def test_nothing_to_carry() -> None:
    assert not carry_all(np.zeros((3, 3)), NODE, pull=True, release_us=start(3)).any()
    assert not carry_all(np.zeros((1, 1)), NODE, pull=False, release_us=start(1)).any()


@pytest.mark.parametrize("ranks", [2, 5, 12])
@pytest.mark.parametrize("pull", [True, False])
def test_no_port_carries_more_than_it_can(ranks: int, pull: bool) -> None:
    random = np.random.default_rng(ranks)
    moved = random.integers(0, 9000, (ranks, ranks)) * 1.0
    np.fill_diagonal(moved, 0)
    release = random.random((ranks, ranks)) * 5
    links = Links(ranks, NODE.node, NODE.network)
    arrived = carry_all(moved, links, pull=pull, release_us=release)
    busiest = max(moved.sum(axis=0).max(), moved.sum(axis=1).max()) / 1e3
    assert busiest <= arrived.max() <= busiest * 3 + 7
    some = moved > 0
    assert (arrived[some] >= (release + moved / 1e3 + 2)[some] - 1e-9).all()
    assert (arrived[~some] == 0).all()


def test_compiled_and_plain_loops_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    moved = random.integers(0, 9000, (6, 6)) * 1.0
    np.fill_diagonal(moved, 0)
    links = Links(3, NODE.node, NODE.network)
    release = random.random((6, 6)) * 5
    compiled = carry_all(moved, links, pull=True, release_us=release)
    monkeypatch.setattr(flows, "_compiled", lambda: flows.carry)
    assert np.array_equal(carry_all(moved, links, pull=True, release_us=release), compiled)
