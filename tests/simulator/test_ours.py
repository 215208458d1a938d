"""Our implementation by hand: what is copied, what arrives when, what buffers hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import flashcp
from flashcp.clusters import read_machine
from flashcp.experiments.cli.compose import compose
from flashcp.sharding.lengths import windows
from flashcp.simulator.cost import Link, Links
from flashcp.simulator.flows import carry_all
from flashcp.simulator.machine import Machine
from flashcp.simulator.ours import ours
from flashcp.simulator.planned import Module, Planned, Setting
from flashcp.simulator.timeline import Hops
from flashcp.simulator.variants import WIRES

RANKS = 4
PACK = next(windows("pile", 32_768, 1, 3))
WHOLE = np.array([4 * 4096])


@pytest.fixture(scope="module")
def machine() -> Machine:
    return read_machine(compose("simulate", [])["cluster"])


def run(
    machine: Machine, strategy: str, exchange: str, overlap: str = "fused", pack: np.ndarray = PACK, **options: str
) -> tuple[Planned, Module]:
    planned = Planned(flashcp.plan(pack, RANKS, strategy), Setting(machine, overlap=overlap, **options))
    return planned, ours(planned, exchange)


@pytest.mark.parametrize("wire", [2, 4])
@pytest.mark.parametrize("overlap", ["none", "staged", "fused"])
@pytest.mark.parametrize("exchange", ["exact", "compacted", "all_gather"])
def test_what_is_copied(machine: Machine, exchange: str, overlap: str, wire: int) -> None:
    """A block is cleared and written whatever carries it; rows of `exact` are packed once.

    Gradients of blocks are put side by side before they leave in a collective; what comes home is read and added to an
    fp32 sum.
    """
    planned, module = run(machine, "per_document", exchange, overlap, gradient_wire=WIRES[wire])
    rows = planned.plan.route(exchange)
    row_bytes, copies = planned.shape.kv_bytes, machine.copies
    if exchange == "exact":
        sent = rows.sent_rows * row_bytes
        others = (planned.traffic > 0).sum(axis=1)
        packed = copies.us(2 * sent, launches=1)
        back = copies.us((wire + 8) * sent / 2, launches=0) + 2 * others * copies.launch_us
    else:
        block = rows.block_rows * row_bytes
        packed = np.full(RANKS, float(copies.us(5 * block, 5)))
        others = (RANKS - 1) * block / 2  # numbers
        side_by_side = 0.0 if overlap == "fused" else copies.us(2 * wire * others)
        back = np.full(RANKS, float(side_by_side + copies.us((wire + 8) * others, 2 * (RANKS - 1))))
    if overlap == "staged":
        packed = packed + copies.us(planned.plan.tokens * 32 * 128 * 10, 2)
    np.testing.assert_allclose(module.forward.busy["copies"], packed)
    np.testing.assert_allclose(module.backward.busy["copies"], back)


def test_what_buffers_hold(machine: Machine) -> None:
    """KV of others is kept for the backward; gradients of received rows and those that come home, in fp32 here, are
    not."""
    for exchange in ("exact", "compacted", "all_gather", "ring"):
        planned, module = run(machine, "per_document", exchange, "staged", gradient_wire="fp32")
        rows = planned.plan.route(exchange)
        received, sent = (int(count.max()) * planned.shape.kv_bytes for count in (rows.received_rows, rows.sent_rows))
        own = planned.block_bytes(exchange) if exchange in ("compacted", "all_gather") else 0
        assert module.kept_bytes == received + own, exchange
        leaving = 2 * sent if own else 0
        assert module.working_bytes == 2 * (received + own) + 2 * sent + leaving, exchange


@pytest.mark.parametrize("exchange", ["exact", "all_gather"])
def test_tiles_of_a_fused_kernel_run_as_their_last_source_arrives(machine: Machine, exchange: str) -> None:
    slow = replace(machine, links=Links(2, Link(20.0, 2.0), Link(5.0, 5.0)))
    planned, module = run(slow, "per_document", exchange)
    reads, traffic = planned.reads, planned.traffic * float(planned.shape.kv_bytes)
    if exchange == "all_gather":
        traffic = planned.block_bytes(exchange) * (1.0 - np.eye(RANKS))
    start = module.forward.busy["copies"]
    release = np.broadcast_to(start[:, None], (RANKS, RANKS))
    arrived = carry_all(traffic, slow.links, pull=True, release_us=release)
    us = planned.own_us(False) + planned.read_us(False).sum(axis=1)
    for rank in range(RANKS):
        shards = np.flatnonzero(reads.rank == rank)
        ready = {
            shard: max([arrived[s, rank] for s in range(RANKS) if s != rank and reads.others[shard, s]], default=0.0)
            for shard in shards
        }
        now = start[rank] + planned.cost.launch_us()
        for shard in sorted(shards, key=lambda shard: ready[shard]):
            now = max(now, ready[shard]) + us[shard]
        assert module.forward.now[rank] == pytest.approx(max(now, arrived[:, rank].max()))
    assert module.forward.now.max() > planned.local_us(False).max() * 1.5  # it had to wait


def test_gradients_of_received_rows_leave_together_before_the_local_ones(machine: Machine) -> None:
    slow = replace(machine, links=Links(8, Link(1.0, 0.0), Link(1.0, 0.0)))
    planned, module = run(slow, "contiguous", "exact", pack=WHOLE)
    remote, local = planned.first_us(True), planned.local_us(True)
    traffic = 1.0 * planned.traffic.T * planned.shape.kv_bytes  # in the model's dtype
    release = np.broadcast_to(remote[:, None], traffic.shape)
    home = carry_all(traffic, slow.links, pull=False, release_us=release).max(axis=0)
    done = np.maximum(home, remote + local) + module.backward.busy["copies"]
    np.testing.assert_allclose(module.backward.now, done)
    _, waits = run(slow, "contiguous", "exact", "none", pack=WHOLE)
    np.testing.assert_allclose(waits.backward.now, np.maximum(home, remote) + local + waits.backward.busy["copies"])


def test_two_sided_collectives_end_for_all_at_once(machine: Machine) -> None:
    planned, module = run(machine, "per_document", "all_gather", "staged")
    block = planned.block_bytes("all_gather")
    arrived = float(machine.copies.us(5 * block, 5)) + machine.links.collective_us(block, RANKS)
    (span,) = [span for span in module.forward.spans if span.kind == "exchange"]
    np.testing.assert_allclose(span.stop, arrived)


def test_a_ring_is_as_fast_home_as_out(machine: Machine) -> None:
    """Two nodes of two: every block passes the slow ports one after another."""
    hops = np.array([100.0, 1.0, 100.0, 1.0])
    assert Hops(hops).around() == pytest.approx(3 * 100, rel=0.02)
    two = replace(machine, links=Links(2, Link(100.0, 0.0), Link(1.0, 0.0)))
    planned, module = run(two, "per_document", "ring", gradient_wire="model")
    hop = planned.block_bytes("ring") / 1e3
    for timeline in module[:2]:
        assert timeline.now.max() == pytest.approx(3 * hop, rel=0.05)
    assert module.exchange_us == pytest.approx(6 * hop, rel=0.05)


def test_a_fused_ring_is_staged(machine: Machine) -> None:
    fused, staged = (run(machine, "contiguous", "ring", overlap)[1] for overlap in ("fused", "staged"))
    for one, other in zip(fused[:2], staged[:2], strict=True):
        np.testing.assert_array_equal(one.now, other.now)


def test_without_overlap_ranks_compute_when_all_is_there(machine: Machine) -> None:
    planned, module = run(machine, "per_document", "exact", "none")
    (span,) = [span for span in module.forward.spans if span.kind == "exchange"]
    np.testing.assert_allclose(module.forward.now, span.stop + planned.first_us(False) + planned.local_us(False))


def test_staged_ranks_merge_what_they_received(machine: Machine) -> None:
    planned, module = run(machine, "per_document", "exact", "staged")
    attention = np.diagonal(planned.step_us(False)) + planned.merge_us(planned.plan.tokens)
    attention = attention + planned.remote_us(False) + planned.merge_us(planned.remote_rows)
    np.testing.assert_allclose(module.forward.busy["attention"], attention)


def test_our_ring_adds_hop_by_hop_once_local_rows_are_computed(machine: Machine) -> None:
    """A wire that takes no time: what is left is attention, merges and sums."""
    quick = replace(machine, links=Links(8, Link(1e12, 0.0), Link(1e12, 0.0)))
    planned, module = run(quick, "per_document", "ring", pack=WHOLE)
    add = float(machine.copies.us(planned.block_bytes("ring") * 2 * 3))
    slowest = (planned.first_us(True) + planned.local_us(True)).max()
    assert module.backward.now.max() == pytest.approx(slowest + 3 * add, rel=0.02)
    merged = sum(planned.merge_us(planned.reading_rows[3, source]) for source in range(3))
    merged += planned.merge_us(planned.plan.tokens[3])
    assert module.forward.busy["attention"][3] == pytest.approx(planned.step_us(False)[3].sum() + merged)
    packed = float(machine.copies.us(4 * planned.block_bytes("ring"), 4))  # picked and put side by side
    np.testing.assert_allclose(module.forward.busy["copies"], packed)
