"""A machine made in Python is checked as one from a file is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flashcp.clusters import clusters, read_cluster
from flashcp.simulator.machine import check_machine, parameters

MACHINE = read_cluster("h100-nvlink")


@pytest.mark.parametrize("name", clusters())
def test_committed_machines_come_through(name: str) -> None:
    check_machine(read_cluster(name))


@pytest.mark.parametrize(
    ("section", "changed", "message"),
    [
        ("", {"gemm_tflops": 0.0}, r"x\.gemm_tflops=0\.0: expected a number > 0"),
        ("copies", {"launch_us": -1.0}, r"x\.copies\.launch_us=-1\.0: expected a number >= 0"),
        ("links", {"ranks_per_node": 0}, r"x\.links\.ranks_per_node=0: expected a whole number >= 1"),
        ("links", {"ranks_per_node": 8.0}, r"x\.links\.ranks_per_node=8\.0: expected a whole number >= 1"),
        ("links", {"ranks_per_node": True}, r"x\.links\.ranks_per_node=True: expected a whole number >= 1"),
        ("links", {"node": 450}, r"x\.links\.node=450: expected a Link$"),
        ("copies", {"gbps": "3000"}, r"x\.copies\.gbps='3000': expected a number > 0"),
        ("copies", {"gbps": float("nan")}, r"x\.copies\.gbps=nan: expected a number > 0"),
        ("attention", {"tile_keys": 48}, r"x\.attention\.tile_keys=48: expected a divisor of tile_queries=128"),
    ],
)
def test_parameters_that_make_no_machine(section: str, changed: dict[str, Any], message: str) -> None:
    inner = {section: replace(getattr(MACHINE, section), **changed)} if section else changed
    with pytest.raises(ValueError, match=f"^{message}"):
        check_machine(replace(MACHINE, **inner), "x")


def test_whole_numbers_are_numbers() -> None:
    check_machine(replace(MACHINE, gemm_tflops=600, copies=replace(MACHINE.copies, gbps=3000, launch_us=0)))


def test_parameters_are_named_by_their_sections() -> None:
    found = parameters(MACHINE)
    assert found["attention.forward.tflops"] == MACHINE.attention.forward.tflops
    assert found["links.node.gbps"] == MACHINE.links.node.gbps
    assert "links.multicast" not in found
