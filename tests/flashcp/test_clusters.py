"""Clusters: every committed one composes, every parameter says where it comes from, wrong ones are refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from flashcp.clusters import clusters, read_cluster, read_cluster_file, read_machine
from flashcp.experiments.bench.calibration import cluster_text
from flashcp.experiments.cli.compose import compose
from flashcp.experiments.cli.schema import GROUPS
from flashcp.simulator.machine import Machine, parameters
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
        ("cluster.links.ranks_per_node=0", "cluster.links.ranks_per_node=0: expected a whole number >= 1 and <="),
        ("cluster.links.ranks_per_node=10000000", "expected a whole number >= 1 and <= 1000000"),
    ],
)
def test_parameters_that_make_no_machine(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        committed("h100-nvlink", override)


def test_a_machine_is_read_back_from_its_file(tmp_path: Path) -> None:
    machine = replace(committed("h100-nvlink"), gemm_tflops=1e-05, provenance={"copies": "a: 'b' # \"c\" µ"})
    file = tmp_path / "mine.yaml"
    file.write_text(cluster_text(machine, "mine"), encoding="utf-8")
    assert read_cluster_file(str(file)) == machine
    assert (
        read_machine({k: v for k, v in OmegaConf.to_container(OmegaConf.load(file)).items() if k != "defaults"})
        == machine
    )
    file.write_text(cluster_text(machine, "mine").replace("gemm_tflops: 1e-05", "gemm_tflops: 1e6"), encoding="utf-8")
    assert read_cluster_file(str(file)).gemm_tflops == 1e6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("- 1", "expected a mapping of fields"),
        ("", "cluster_file='.*mine.yaml': name is missing"),
        ("name: x", "cluster_file='.*mine.yaml': attention is missing"),
        ("5", "expected a mapping of fields"),
        ("&a [*a]", "expected a mapping of fields"),
        ("a: &a {b: *a}", "nested too deeply, or a part holds itself"),
        ("name: !!int ''", r"\.yaml'?: not YAML \(string index"),
        ("name: !!bool x", r"\.yaml'?: not YAML \('x'\)"),
        ("name: !!timestamp a", r"\.yaml'?: not YAML \('NoneType'"),
        ("name: 2001-99-99", r"\.yaml'?: not YAML \(month must be in 1..12\)"),
        ("defaults: [h100]", "defaults holds 'h100': expected one of a100-nvlink, h100-ib-400g"),
        ("defaults: [{cluster: h100-nvlink}]", "defaults holds {'cluster': 'h100-nvlink'}: expected one of a100"),
        ("defaults: h100-nvlink", "defaults='h100-nvlink': expected a list of a100-nvlink"),
        ("defaults: [h100-nvlink]\nlinks: {ranks: 4}", "cluster_file.links.ranks: no such field"),
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


@pytest.mark.parametrize("line", ["    latency_us: 2.0", "  sync_us: 40.0"])
def test_a_missing_field_is_named_with_its_sections(line: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text((ROOT / "conf/cluster/h100-nvlink.yaml").read_text().replace(f"{line}\n", "", 1))
    path = {"latency_us": "links.node.latency_us", "sync_us": "published.sync_us"}[line.split(":")[0].strip()]
    with pytest.raises(ValueError, match=re.escape(f"cluster_file={str(file)!r}: {path} is missing")):
        read_cluster_file(str(file))


@pytest.mark.parametrize("name", GROUPS["cluster"])
def test_a_committed_file_is_also_a_cluster_file(name: str) -> None:
    assert read_cluster_file(str(ROOT / f"conf/cluster/{name}.yaml")) == committed(name)


@pytest.mark.parametrize("name", GROUPS["cluster"])
def test_a_cluster_is_read_by_its_name_as_hydra_composes_it(name: str) -> None:
    assert read_cluster(name) == committed(name)


def test_a_cluster_that_there_is_not() -> None:
    assert clusters() == GROUPS["cluster"]
    with pytest.raises(ValueError, match=r"^cluster='h1000': expected one of a100-nvlink, h100-ib-400g, "):
        read_cluster("h1000")


def test_a_file_builds_on_committed_clusters(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("defaults: [h200-nvlink, h100-ib-400g, _self_]\nname: mine\nlinks: {node: {gbps: 7}}\n")
    machine, network = read_cluster_file(str(file)), committed("h100-ib-400g", "cluster.links.node.gbps=7")
    assert (machine.name, machine.links) == ("mine", network.links)
    assert machine.attention == network.attention  # the later one's
    file.write_text("name: mine\ndefaults: [_self_, h100-nvlink]\n")
    assert read_cluster_file(str(file)).name == "h100-nvlink"
