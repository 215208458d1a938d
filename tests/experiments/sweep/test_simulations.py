"""Sweeps that simulate: what is refused before the first job, names of cases, sweeps too narrow for their figure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flashcp.experiments.cli.main import main
from flashcp.experiments.sweep.results import read_rows
from flashcp.experiments.sweep.simulations import case_name
from tests.checkout import ROOT
from tests.experiments.jobs import expand

MEASURED = f"measured=[{ROOT / 'experiments/results/demo_repeats'}]"
TINY = ["windows=1", "context=8192", "world_size=2"]


def cases(*overrides: str) -> list[str]:
    return [case_name(job.settings) for job in expand("simulations", ["simulation=paper_fig3", *overrides])]


def test_a_case_has_the_name_of_the_machine_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("defaults: [h100-nvlink, _self_]\nname: mine\n")
    assert cases(f"cluster_file={file}") == ["1x131072-c128k-n8-h32-mine", "16x8192-c128k-n8-h32-mine"]


def test_a_file_replaces_the_cluster_that_a_sweep_names_itself(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("defaults: [h100-nvlink, _self_]\nname: mine\n")
    words = [f"cluster_file={file}", MEASURED, "windows=1", "methods=[llama3,flashcp]", f"out={tmp_path / 'out'}"]
    assert main(["sweep", "experiment=demo_predicted", *words]) == 0
    simulated = {row.device for row in read_rows(tmp_path / "out") if row.kind == "simulated"}
    assert simulated == {"simulated mine"}


def test_lists_and_files_of_lengths_are_told_apart() -> None:
    assert len(set(cases("data.lengths=[100,200],[200,100],[300]"))) == 3
    assert cases("data.lengths=[100,200]") == cases("data.lengths=[100,200]")
    assert len(set(cases("data.lengths=[]", "data.path=a.txt,b.txt"))) == 2


@pytest.mark.parametrize(
    ("name", "overrides", "why"),
    [
        ("paper_fig3", ["methods=[llama3]"], "no row for 1x131072"),
        ("paper_fig3", ["data.lengths=[8192]"], "0 cases of data=1x131072"),
        ("paper_fig3", ["metrics=[speedup]"], "no row for 1x131072"),
        ("paper_fig6", ["data=redpajama"], "0 cases of data=wlb_llm"),
        ("paper_fig7", ["methods=[flashcp]"], "0 cases of"),
        ("speedup_parts", ["methods=[flashcp]", "data=pile"], "0 cases of data=wlb_llm"),
        ("beyond_paper", ["methods=[llama3]", "data=pile", "cluster=h100-nvlink"], "not enough values to unpack"),
        ("demo_predicted", ["measured=[]"], "no measured step of llama3"),
        ("demo_predicted", ["methods=[flashcp]", MEASURED], "no row for"),
    ],
)
def test_rows_stay_where_a_sweep_is_too_narrow_for_its_figure(
    name: str, overrides: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", f"experiment={name}", f"out={tmp_path}", *TINY, *overrides]) == 0
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("no figure: ")]
    assert why in line
    assert out == ""
    assert read_rows(tmp_path)
    assert not (tmp_path / f"{name}.png").exists()


def test_a_table_without_the_data_as_sampled_keeps_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ortools")
    small = ["solver.granule=1024", "solver.limit_s=1", "data.long_document_weight=10"]
    assert main(["sweep", "experiment=paper_table2", f"out={tmp_path}", *TINY, *small]) == 0
    assert "no figure: no rows of data.long_document_weight=1" in capsys.readouterr().err
    assert read_rows(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("paper_fig3 metrics=[modul_ms]", "metrics: 'modul_ms': expected one of data_parallel, head_ranks"),
        ("paper_fig3 metrics=[name]", "metrics: 'name': expected one of data_parallel"),
        ("paper_table2 metrics=[module_ms]", "metrics: 'module_ms': expected one of saving, imbalance, exact_saving"),
        ("paper_fig3 world_size=8,0", "world_size=0: expected a whole number >= 1 and <= 1024"),
        ("paper_fig3 world_size=2000", "world_size=2000: expected a whole number >= 1 and <= 1024"),
        ("paper_fig3 name=a/b", "name='a/b': expected the name of a folder below outputs/"),
        ("paper_fig3 name=..", "name='..': expected the name of a folder below outputs/"),
        ("paper_fig3 figure=x.png", "figure='x.png': a sweep draws its own beside its rows"),
        ("paper_fig3 cluster_file=x.yaml cluster.gemm_tflops=3", "cluster_file='x.yaml' and cluster.gemm_tflops=3"),
        (
            "beyond_paper world_size=8 context=65536 data=pile cluster_file=x.yaml",
            "cluster_file='x.yaml' and cluster=h100-nvlink: expected one or the",
        ),
    ],
)
def test_refused_before_the_first_job(refused: Callable[..., str], words: str, message: str) -> None:
    experiment, *overrides = words.split()
    assert refused("sweep", f"experiment={experiment}", *overrides).startswith(message)


def test_every_metric_that_is_legal_makes_rows(tmp_path: Path) -> None:
    from flashcp.experiments.sweep.simulations import METRICS

    assert main(["sweep", "experiment=paper_fig3", f"out={tmp_path}", *TINY, "data.lengths=[8192]"]) == 0
    assert {row.metric for row in read_rows(tmp_path)} == {*METRICS, "windows"}
