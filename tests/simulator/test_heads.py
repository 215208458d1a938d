"""Head ranks: what they may be, what their all-to-alls carry, what stays as it was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import flashcp
from flashcp.clusters import read_cluster
from flashcp.sharding.lengths import windows
from flashcp.simulator.cost import AttentionShape, Link, Links
from flashcp.simulator.members import legal_head_ranks, member_links
from flashcp.simulator.module import simulate_module
from flashcp.simulator.pack import Batch, simulate_batch
from flashcp.simulator.planned import Planned, Setting
from flashcp.simulator.variants import VARIANTS, Variant

MACHINE = read_cluster("h100-nvlink")
PACK = next(windows("pile", 65_536, 1, 3))
FLASHCP = VARIANTS["flashcp"]


def test_one_head_rank_is_what_the_simulator_said_before_it_knew_of_them() -> None:
    """Module ms of commit ac525e8, 16 ranks."""
    methods = {"llama3": 17.031354270921863, "ring_zigzag": 98.38025944084156, "ulysses": 5.272477513688694}
    methods |= {"flashcp": 8.034406032917278, "flashcp_paper_best_effort": 7.936286134110196}
    table = flashcp.simulate(PACK, 16, methods=list(methods), head_ranks=1, gradient_wire="fp32")
    for name, expected in methods.items():
        assert table[name].module_ms == pytest.approx(expected, rel=1e-9), name


@pytest.mark.parametrize(
    ("shape", "ranks", "node", "expected"),
    [
        ((32, 32), 64, 8, [1, 2, 4, 8, 16, 32]),
        ((32, 8), 8, 8, [1, 2, 4, 8]),
        ((12, 4), 12, 8, [1, 2, 4, 12]),  # of 12 ranks one holder; of 3 or 6 holders would lie across nodes; 12 = 3 x 4
        ((12, 4), 6, 8, [1, 2]),  # 3 and 6 do not go with 4 KV heads
        ((6, 6), 6, 8, [1, 2, 3, 6]),  # all inside a node
        ((32, 1), 4, 1, [1, 2, 4]),
        ((4, 4), 8, 8, [1, 2, 4]),
        ((7, 7), 4, 8, [1]),
    ],
)
def test_which_head_ranks_there_may_be(shape: tuple[int, int], ranks: int, node: int, expected: list[int]) -> None:
    links = replace(MACHINE.links, ranks_per_node=node)
    assert legal_head_ranks(AttentionShape(*shape), links, ranks) == expected


def planned(head_ranks: int, ranks: int = 16, kv_heads: int = 32, **options: str) -> Planned:
    setting = Setting(MACHINE, AttentionShape(32, kv_heads), head_ranks=head_ranks, **options)
    return Planned(flashcp.plan(PACK, ranks // head_ranks, "flashcp"), setting)


@pytest.mark.parametrize("wire", ["auto", "model", "fp32"])
@pytest.mark.parametrize("head_ranks", [2, 8])
@pytest.mark.parametrize("kv_heads", [32, 2])
def test_all_to_alls_by_hand(head_ranks: int, kv_heads: int, wire: str) -> None:
    """Around the same exchange: Q, K, V in and O out; back the gradient of O in, those of Q, K and V out. Those of KV
    heads that ranks share are twice as wide in fp32, and travel by themselves."""
    here = planned(head_ranks, kv_heads=kv_heads, gradient_wire=wire)
    rows = -(-int(here.plan.tokens.max()) // head_ranks)
    module = simulate_module(here, FLASHCP._replace(implementation="best effort"))
    query_heads, kv = 32 // head_ranks, max(1, kv_heads // head_ranks)
    query, key = (rows * heads * 128 * 2 for heads in (query_heads, kv))
    apart = head_ranks > kv_heads and wire != "model"
    moved = [query + 2 * key, query, query, *([query, 4 * key] if apart else [query + 2 * key])]
    us = [(head_ranks - 1) * pair / (1e3 * MACHINE.links.node.gbps) + MACHINE.links.node.latency_us for pair in moved]
    assert module.forward.busy["exchange"] == pytest.approx(sum(us[:2]))
    assert module.backward.busy["exchange"] == pytest.approx(sum(us[2:]))
    inner = simulate_module(Planned(here.plan, here.setting), FLASHCP._replace(implementation="best effort"))
    assert module.exchange_us == pytest.approx(inner.exchange_us)
    last = module.forward.spans[-1]
    np.testing.assert_allclose(last.stop - last.start, us[1])
    np.testing.assert_allclose(last.stop, module.forward.now)


def test_a_member_has_its_heads_its_ports_and_its_neighbours() -> None:
    here = planned(4, ranks=32)
    assert (here.ranks, here.shape.query_heads, here.shape.kv_heads) == (8, 8, 8)
    assert here.links.nodes(8).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert planned(16, ranks=32).links.nodes(2).tolist() == [0, 1]
    assert planned(4, kv_heads=2).shape.kv_heads == 1


def test_members_share_a_port_that_their_node_has_alone() -> None:
    one_port = replace(MACHINE.links, shared_port=True)
    for head_ranks, members in ((1, 1), (4, 4), (8, 8), (16, 8)):
        assert member_links(MACHINE.links, head_ranks).network == MACHINE.links.network
        assert member_links(one_port, head_ranks).network.gbps == MACHINE.links.network.gbps / members
        assert member_links(one_port, head_ranks).shared_port


@pytest.mark.parametrize("exchange", ["exact", "all_gather", "ring"])
def test_all_members_together_carry_the_rows_of_the_holders_plan(exchange: str) -> None:
    """Bytes between holders do not change with the heads that share them; an idle member would be lost bytes."""
    one, all_heads = planned(4), Planned(planned(4).plan, Setting(MACHINE))
    assert one.ranks == all_heads.ranks
    members = 4 * one.traffic * one.shape.kv_bytes
    np.testing.assert_array_equal(members, all_heads.traffic * all_heads.shape.kv_bytes)
    assert 4 * one.block_bytes(exchange) == all_heads.block_bytes(exchange)
    assert 4 * sum(one.own_us(False)) < sum(all_heads.own_us(False)) * 1.01 + 1


def test_every_rank_alone_with_its_heads_is_ulysses() -> None:
    """h = N: no plan matters, the all-to-alls are ulysses's, and nothing else is sent."""
    for name in ("flashcp", "ring", "per_document"):
        pair = Variant("", name if name != "ring" else "contiguous", "exact", "best effort", head_ranks=8)
        other = VARIANTS["ulysses_best_effort"]._replace(head_ranks=8)
        found = simulate_batch(Batch([PACK], 8, Setting(MACHINE)), [pair, other])
        assert found[pair] == pytest.approx(found[other])
    assert found[other].critical_rows == 2 * (65_536 // 8) * 7 / 8
    assert found[other].saving == pytest.approx(1 - 2 / 8)


def test_head_ranks_keep_rows_off_the_network() -> None:
    """Each row enters a node once, in 8 parts over 8 ports; h = 1 sends it to each reader by itself."""
    table = flashcp.simulate(PACK, 64, methods=[f"flashcp:h{h}" for h in (1, 2, 4, 8)])
    exchange = [one.exchange_ms for one in table]
    assert exchange == sorted(exchange, reverse=True)
    assert exchange[0] > 2 * exchange[-1]
    every = flashcp.simulate(PACK, 64, methods=[f"flashcp:h{h}" for h in (1, 2, 4, 8, 16, 32)])
    best = flashcp.simulate(PACK, 64, methods="flashcp")["flashcp"]
    assert best._replace(name="") in [one._replace(name="") for one in every]
    assert best.module_ms == min(one.module_ms for one in every)


def test_copies_of_our_all_to_alls_are_the_operator_s() -> None:
    """Gradients of K and V are packed and unpacked, all else is copied once."""
    table = flashcp.simulate([8192] * 4, 4, methods=["ulysses", "flashcp:h4"], kv_heads=8)
    machine = read_cluster("h100-nvlink")
    query_bytes, kv_bytes = (8192 * heads * 128 * 2 for heads in (32, 2 * 8))
    moved = 2 * (4 * query_bytes + 3 * kv_bytes) / (1e6 * machine.copies.gbps)
    assert table["flashcp:h4"].copies_ms == pytest.approx(moved + 6 * machine.copies.launch_us / 1e3)
    assert table["ulysses"].copies_ms == pytest.approx(
        moved + 2 * (4 * query_bytes + kv_bytes) / (1e6 * machine.copies.gbps) + 8 * machine.copies.launch_us / 1e3
    )


def test_an_endless_wire_leaves_head_ranks_nothing_but_copies() -> None:
    free = replace(MACHINE, links=Links(8, Link(1e15, 0.0), Link(1e15, 0.0)))
    one, eight = flashcp.simulate(PACK, 16, cluster=free, methods=["flashcp:h1", "flashcp:h8"])
    assert eight.attention_ms <= one.attention_ms * 1.1  # cut less, it reads fewer prefixes
    assert eight.exposed_exchange_ms == pytest.approx(0, abs=0.05 * eight.module_ms)


def test_a_plan_of_holders_is_simulated_with_their_head_ranks() -> None:
    plan = flashcp.plan(PACK, 4)
    given = flashcp.simulate(plan, head_ranks=4, methods=["plan", "plan+ulysses"])
    assert given["plan"].head_ranks == 4
    assert given["plan+ulysses"].head_ranks == 16
    same = flashcp.simulate(PACK, 16, methods="flashcp:h4", plan_by="rows")
    assert given["plan"].module_ms == same.methods[0].module_ms
    with pytest.raises(ValueError, match=r"^world_size=6 with plans for 4 ranks: expected one number of ranks$"):
        flashcp.simulate(plan, 6)
    with pytest.raises(ValueError, match=r"^world_size=4 with plans for 8 ranks: expected one number of ranks$"):
        flashcp.simulate(plan, 4, head_ranks=2)
