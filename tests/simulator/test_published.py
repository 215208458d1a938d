"""The published rings: what travels and is copied beside the kernels, step by step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import flashcp
from flashcp.clusters import read_machine
from flashcp.experiments.cli.compose import compose
from flashcp.simulator.cost import CopyCost, Link, Links
from flashcp.simulator.machine import Machine
from flashcp.simulator.planned import Module, Planned, Setting
from flashcp.simulator.published import published_ring

RANKS, ROWS = 4, 8192
PACK = [4 * ROWS]


@pytest.fixture(scope="module")
def machine() -> Machine:
    return read_machine(compose("simulate", [])["cluster"])


def run(machine: Machine, strategy: str, pack: list[int] = PACK, ranks: int = RANKS) -> tuple[Planned, Module]:
    planned = Planned(flashcp.plan(pack, ranks, strategy), Setting(machine))
    return planned, published_ring(planned)


def free_copies(machine: Machine) -> Machine:
    published = replace(machine.published, sync_us=0.0)
    return replace(machine, copies=CopyCost(1e15), published=published)


@pytest.mark.parametrize("strategy", ["contiguous", "per_document"])
def test_a_slow_wire_carries_every_message_after_the_other(machine: Machine, strategy: str) -> None:
    """KV goes to the next rank 3 times each way, its gradient 4 times in fp32 and twice as many bytes."""
    gbps = 0.001
    slow = replace(free_copies(machine), links=Links(8, Link(gbps, 0.0), Link(gbps, 0.0)))
    planned, module = run(slow, strategy)
    hop = planned.block_bytes("ring") / (1e3 * gbps)
    assert module.forward.now.max() == pytest.approx(3 * hop, rel=0.01)
    assert module.backward.now.max() == pytest.approx((3 + 4 * 2) * hop, rel=0.01)
    assert module.exchange_us == pytest.approx((3 + 3 + 4 * 2) * hop, rel=0.01)


def test_the_last_gradient_s_way_home_is_never_hidden(machine: Machine) -> None:
    planned, module = run(free_copies(machine), "per_document")
    hop = 2 * planned.block_bytes("ring") / (1e3 * machine.links.node.gbps)
    busy = planned.step_us(True).sum(axis=1).min()
    assert module.backward.now.min() >= busy + hop


def test_copies_are_those_counted_in_the_library(machine: Machine) -> None:
    """The last rank of a contiguous ring merges three times: bytes for each number of Q, K and log-sum-exp."""
    _, module = run(machine, "contiguous")
    numbers, heads = ROWS * 32 * 128, ROWS * 32
    forward = (12 + 3 * 10) * numbers + 3 * 40 * heads
    backward = (12 + 3 * 10) * numbers + (24 + 3 * 20) * numbers
    for timeline, moved, launches in ((module.forward, forward, 14), (module.backward, backward, 15)):
        us = float(machine.copies.us(moved, launches))
        assert timeline.busy["copies"][-1] == pytest.approx(us)
        assert timeline.busy["copies"][0] < 0.5 * us  # it merges nothing


def test_the_zigzag_s_host_waits_for_every_document(machine: Machine) -> None:
    one, many = (run(machine, "per_document", [ROWS // n] * (4 * n))[1] for n in (1, 8))
    more = (32 - 4) * (4 + 2)  # times the host waits, for as many more documents
    launches = (32 - 4) * (4 + 1)
    waited = more * machine.published.sync_us + launches * machine.copies.launch_us
    copies = [sum(timeline.busy["copies"] for timeline in module[:2]) for module in (one, many)]
    assert copies[1] - copies[0] == pytest.approx(np.full(RANKS, waited))


def test_alone_there_is_nobody_to_send_to(machine: Machine) -> None:
    for strategy in ("contiguous", "per_document"):
        _, module = run(machine, strategy, ranks=1)
        assert module.exchange_us == 0
        assert not module.forward.busy["exchange"].any()
