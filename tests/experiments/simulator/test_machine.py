"""Clusters: every committed one composes, every parameter says where it comes from, wrong ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashcp.experiments.compose import compose
from flashcp.experiments.schema import GROUPS
from flashcp.experiments.simulator.cluster_file import cluster_text, read_cluster_file
from flashcp.experiments.simulator.machine import Machine, parameters, read_machine
from tests.checkout import ROOT


def committed(name: str, *overrides: str) -> Machine:
    return read_machine(compose("simulate", [f"cluster={name}", *overrides])["cluster"])


@pytest.mark.parametrize("name", GROUPS["cluster"])
def test_every_parameter_of_a_committed_cluster_has_a_provenance(name: str) -> None:
    machine = committed(name)
    assert machine.name == name
    for parameter in parameters(machine):
        sections = [parameter.rsplit(".", cut)[0] for cut in range(parameter.count(".") + 1)]
        assert any(machine.provenance.get(section) for section in sections), parameter
    known = parameters(machine)
    for section in machine.provenance:
        assert any(parameter == section or parameter.startswith(f"{section}.") for parameter in known), section


@pytest.mark.parametrize("name", GROUPS["cluster"])
def test_the_first_line_of_a_cluster_is_the_command_that_uses_it(name: str) -> None:
    text = (ROOT / f"conf/cluster/{name}.yaml").read_text()
    assert text.startswith(f"# flashcp simulate cluster={name};")


def test_clusters_differ_as_their_names_say() -> None:
    h100, h200, network, a100 = map(committed, ("h100-nvlink", "h200-nvlink", "h100-ib-400g", "a100-nvlink"))
    assert h200.attention.forward.tflops == h100.attention.forward.tflops
    assert h200.attention.forward.kv_gbps > h100.attention.forward.kv_gbps
    assert (network.links.ranks_per_node, network.links.network.gbps) == (1, 50)
    assert a100.links.node.gbps < h100.links.node.gbps
    assert "datasheet" in a100.provenance["links.network"]


def test_a_parameter_is_an_override() -> None:
    assert committed("h100-nvlink", "cluster.links.node.gbps=900").links.node.gbps == 900


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.attention.forward.tflops=0", "cluster.attention.forward.tflops=0.0: expected a number > 0"),
        ("cluster.links.node.latency_us=-1", "cluster.links.node.latency_us=-1.0: expected a number >= 0"),
        ("cluster.copies.gbps=inf", "cluster.copies.gbps=inf: expected a number > 0"),
        ("cluster.attention.tile_keys=48", "tile_keys=48: expected a divisor of tile_queries=128"),
        ("cluster.links.ranks_per_node=0", "cluster.links.ranks_per_node=0: expected a number > 0"),
    ],
)
def test_parameters_that_make_no_machine(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        committed("h100-nvlink", override)


def test_a_machine_is_read_back_from_its_file(tmp_path: Path) -> None:
    machine = committed("h100-nvlink")
    file = tmp_path / "mine.yaml"
    file.write_text(cluster_text(machine, "mine"))
    assert read_cluster_file(str(file)) == machine


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("- 1", "expected a mapping of fields"),
        ("name: x", "missing"),
        ("nam: x", "cluster_file.nam: no such field"),
    ],
)
def test_files_that_hold_no_machine(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_cluster_file(str(file))
    with pytest.raises(ValueError, match="cannot be read"):
        read_cluster_file(str(tmp_path / "none.yaml"))


def test_a_committed_file_is_also_a_cluster_file() -> None:
    path: Any = ROOT / "conf/cluster/h100-nvlink.yaml"
    assert read_cluster_file(str(path)) == committed("h100-nvlink")
