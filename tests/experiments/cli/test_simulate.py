"""`flashcp simulate`: its fields, its files, its refusals; the numbers behind them are simulator/test_pack.py's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashcp.experiments.cli.main import main
from flashcp.simulator.variants import VARIANTS
from tests.checkout import ROOT

SMALL = ["windows=3", "context=8192", "world_size=4"]
FIELDS = ["name", "sharding", "exchange", "imbalance", "imbalance_max", "critical_rows", "saving", "attention_ms"]
FIELDS += ["exchange_ms", "exposed_exchange_ms", "copies_ms", "module_ms", "speedup"]


@pytest.fixture
def simulate(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*overrides: str) -> dict[str, Any]:
        assert main(["simulate", *SMALL, *overrides, "--json"]) == 0
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return document

    return run


def test_every_method_with_every_field(simulate: Any) -> None:
    document = simulate()
    methods = {method["name"]: method for method in document["methods"]}
    assert list(methods) == list(VARIANTS)
    for method in methods.values():
        assert set(FIELDS) <= set(method)
        assert method["speedup"] == pytest.approx(methods["llama3"]["module_ms"] / method["module_ms"])
        parts = method["attention_ms"] + method["copies_ms"] + method["exposed_exchange_ms"]
        assert parts == pytest.approx(method["module_ms"])
        assert method["module_ms_p50"] <= method["module_ms_p95"]
        assert method["step_ms"] == pytest.approx(32 * method["layer_ms"])
    assert methods["llama3"]["speedup"] == 1
    assert document["cluster"]["name"] == "h100-nvlink"
    assert document["cluster"]["provenance"]
    assert document["kind"] == "simulated"
    overlaps = {name: method["overlap"] for name, method in methods.items()}
    assert (overlaps["llama3"], overlaps["ring"], overlaps["flashcp"]) == ("none", "ring", "staged")


def test_it_plans_what_plan_plans(simulate: Any, capsys: pytest.CaptureFixture[str]) -> None:
    simulated = simulate("data=pile", "head_ranks=1", "plan_by=rows")["methods"]
    assert main(["plan", *SMALL, "data=pile", "--json"]) == 0
    for method in json.loads(capsys.readouterr().out)["methods"]:
        same = next(one for one in simulated if one["name"] == method["name"])
        for field in ("imbalance", "imbalance_max", "critical_rows", "saving"):
            assert same[field] == pytest.approx(method[field])


def test_it_plans_by_time_unless_told_otherwise(simulate: Any, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["data=lengths", "data.lengths=[3000,500,100]", "context=3600", "world_size=4", "method=flashcp"]
    timed, rows = (simulate(*short, "head_ranks=1", *told) for told in ([], ["plan_by=rows"]))
    assert (timed["plan_by"], rows["plan_by"]) == ("time", "rows")
    assert timed["methods"][0]["module_ms"] < 0.95 * rows["methods"][0]["module_ms"]
    assert main(["simulate", *short, "plan_by=luck"]) == 2
    assert capsys.readouterr().err == "flashcp: error: plan_by='luck': expected one of time, rows\n"


def test_a_file_of_lengths_in_its_order(simulate: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "lengths.txt"
    file.write_text("5000\n3192\n100\n8092\n")
    lengths = ["data=lengths", f"data.path={file}"]
    assert (simulate(*lengths)["windows"], simulate(*lengths)["documents"]) == (2, 4)
    capsys.readouterr()
    simulate(*lengths, "windows=1", "context=8000")
    assert capsys.readouterr().err == ""
    assert main(["simulate", *SMALL, *lengths, "windows=1", "context=8000"]) == 0
    said = "left out: 2 of 4 lengths come after the last window; 2.3% of the tokens are cut off at ends of windows\n"
    assert capsys.readouterr().err == said
    assert main(["simulate", *SMALL, *lengths]) == 0
    out = capsys.readouterr().out
    assert out.startswith("2 windows of 8192 tokens from lengths, 2.0 documents on average, 4 ranks; simulated on h100")
    assert "speedup over llama3" in out
    assert out.splitlines()[-1].startswith("fastest: ")


def test_methods_pairs_and_options(simulate: Any) -> None:
    def names(*overrides: str) -> list[str]:
        return [method["name"] for method in simulate(*overrides)["methods"]]

    assert names("method=per_document") == ["per_document"]
    assert names("methods=[ring_best_effort,flashcp]") == ["ring_best_effort", "flashcp"]
    assert names("sharding=contiguous", "exchange=exact") == ["contiguous+exact"]
    assert names("methods=[llama3,contiguous+exact]") == ["llama3", "contiguous+exact"]
    loose, tight = (
        simulate("method=flashcp", "head_ranks=1", f"sharding.tolerance={t}")["methods"][0] for t in (1.5, 1.001)
    )
    assert loose["imbalance"] > tight["imbalance"]


def test_overlap_is_of_ours_alone(simulate: Any) -> None:
    levels = ("none", "staged", "fused", "auto")
    none, staged, fused, auto = (
        {m["name"]: m for m in simulate(f"overlap={o}", "head_ranks=1")["methods"]} for o in levels
    )
    assert none["llama3"] == staged["llama3"] == fused["llama3"]
    assert none["flashcp"]["module_ms"] > fused["flashcp"]["module_ms"]
    assert auto == staged
    assert none["flashcp"]["overlap"] == "none"


def test_across_nodes_auto_is_about_as_quick_as_the_quickest_level(simulate: Any) -> None:
    two_nodes = ["data=lengths", "data.lengths=[60000,40000,20000,11072]", "context=131072", "world_size=16"]
    auto, none, fused = (
        simulate(*two_nodes, "methods=[flashcp]", f"overlap={o}", "head_ranks=1")["methods"][0]["module_ms"]
        for o in ("auto", "none", "fused")
    )
    assert auto <= 1.03 * min(none, fused)


def test_workers_change_nothing(simulate: Any) -> None:
    pair = ["methods=[llama3,flashcp]"]
    assert simulate(*pair, "workers=2")["methods"] == simulate(*pair)["methods"]


def test_a_step_is_the_layers_with_their_matrix_products(simulate: Any) -> None:
    small = simulate("method=llama3", "model.layers=2", "model.ffn_dim=1024")["methods"][0]
    rows, dim = 8192 / 4, 4096
    products = 6 * (4 * dim * dim + 3 * dim * 1024) * rows / (600e12) * 1e3
    assert small["step_ms"] == pytest.approx(2 * (small["module_ms"] + products))


def test_memory_is_of_all_layers_kv_and_one_layer_s_buffers(simulate: Any) -> None:
    one, two = (simulate("method=llama3", f"model.layers={layers}")["methods"][0] for layers in (1, 2))
    window = 8192 * 2 * 32 * 128 * 2 / 2**20
    assert one["kv_buffer_mib"] == pytest.approx(2 * window)
    assert two["kv_buffer_mib"] == pytest.approx(3 * window)


def test_ulysses_is_left_out_where_heads_do_not_divide(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *SMALL, "model.query_heads=2", "model.kv_heads=2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert not [method for method in json.loads(out)["methods"] if method["exchange"] == "ulysses"]
    assert err.startswith(
        "left out: ulysses, for model.query_heads=2, model.kv_heads=2 cannot be shared out among 4 ranks"
    )


def test_a_cluster_file(simulate: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text((ROOT / "conf/cluster/h100-nvlink.yaml").read_text().replace("name: h100-nvlink", "name: mine"))
    assert simulate(f"cluster_file={file}")["cluster"]["name"] == "mine"


def test_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["methods=[llama3,ring,flashcp]", f"figure={tmp_path / 'timeline'}"]
    assert main(["simulate", *SMALL, *overrides]) == 0
    assert f"wrote {tmp_path / 'timeline.png'}" in capsys.readouterr().err
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_that_cannot_be_written_is_refused_before_anything_is_simulated(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("simulated")

    monkeypatch.setattr("flashcp.experiments.cli.simulate.simulate", never)
    (tmp_path / "file").write_text("mine")
    for figure in (".", "file/x.png", "x.nope", "x" * 300, f"{'x' * 300}.png"):
        assert refused("simulate", f"figure={figure}").startswith("figure=")


def test_the_directory_of_a_figure_is_made(tmp_path: Path) -> None:
    file = tmp_path / "new" / "timeline.svg"
    assert main(["simulate", *SMALL, "methods=[llama3]", f"figure={file}"]) == 0
    assert file.read_text().startswith("<?xml")


def test_faster_than_half_a_minute(simulate: Any) -> None:
    """A hundred windows of 128K take some seconds; this many, a tenth of it, leave room for a busy machine."""
    import time

    simulate("data=pile", "context=131072", "windows=1", "world_size=8")  # what a process compiles once
    started = time.thread_time()
    simulate("data=pile", "context=131072", "windows=10", "world_size=8")
    assert time.thread_time() - started < 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["overlap=some"], "overlap='some': expected one of auto, none, staged, fused"),
        (["gradient_wire=bf16"], "gradient_wire='bf16': expected one of auto, model, fp32"),
        (["methods=[llama]"], "methods: 'llama': expected one of llama3, per_document"),
        (["methods=[llama3]", "method=ring"], "expected one or the other"),
        (
            ["method=ulysses", "world_size=3"],
            "ulysses: model.query_heads=32, model.kv_heads=32 cannot be shared out among 3 ranks",
        ),
        (["model.layers=0"], "model.layers=0: expected a whole number >= 1"),
        (["model.kv_heads=3"], "model.query_heads=32: expected a multiple of model.kv_heads=3"),
        (["cluster=none"], "cluster=none: expected one of a100-nvlink, h100-ib-400g"),
        (["cluster_file=none.yaml"], "cluster_file='none.yaml': cannot be read"),
        (["cluster_file=x.yaml", "cluster=h200-nvlink"], "cluster_file='x.yaml' and cluster=h200-nvlink: expected one"),
        (["cluster_file=x.yaml", "cluster.gemm_tflops=9"], "cluster_file='x.yaml' and cluster.gemm_tflops=9: expected"),
        (["workers=0"], "workers=0: expected a whole number >= 1"),
        (["world_size=0"], "world_size=0: expected a whole number >= 1"),
        (["windows=0"], "windows=0: expected a whole number >= 1"),
        (["method=flashcp", "sharding.tolerance=0.5"], "sharding.tolerance=0.5"),
        (["figure=."], "figure='.': cannot be written"),
        (["figure=x.png", "batch_windows=2"], "figure='x.png' with batch_windows: expected one or the other"),
        (["batch_windows=3"], "batch_windows=3: expected a divisor of world_size=8"),
        (["head_ranks=3"], "head_ranks=3: expected one of 1, 2, 4, 8, or auto"),
        (["head_ranks=many"], "head_ranks='many': expected auto or a whole number >= 1"),
        (["waits=layer"], "waits='layer': expected one of micro_batch, step"),
        (["figure=/proc/no/x.png"], "figure='/proc/no': cannot be written"),
        (["figure=x.nope"], "figure='x.nope': expected a file *."),
        (["zz=1"], "zz: no such override"),
    ],
)
def test_refusals(refused: Callable[..., str], overrides: list[str], message: str) -> None:
    assert message in refused("simulate", "windows=1", "context=1024", *overrides)


@pytest.mark.parametrize("text", ["", "\n\n", "12\n-3\n", "12\nabc\n", "1.5\n", "0\n", "12 13\n"])
def test_files_that_hold_no_lengths(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "lengths.txt"
    file.write_text(text)
    assert main(["simulate", "data=lengths", f"data.path={file}"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "lengths.txt" in err


def test_medians_are_of_single_windows(simulate: Any) -> None:
    lengths, ours = "data.lengths=[8192,4096,4096,1000,7192]", ["method=flashcp", "head_ranks=1", "data=lengths"]
    singly = []
    for pack in ("[8192]", "[4096,4096]", "[1000,7192]"):
        singly.append(simulate(*ours, f"data.lengths={pack}")["methods"][0])
    together = simulate(*ours, lengths)["methods"][0]
    assert together["module_ms_p50"] == pytest.approx(np.median([one["module_ms"] for one in singly]))
    assert together["speedup_p50"] == pytest.approx(np.median([one["speedup"] for one in singly]))
    assert together["module_ms"] == pytest.approx(np.mean([one["module_ms"] for one in singly]))


def test_a_batch_says_who_has_its_windows(simulate: Any) -> None:
    chosen = [
        "world_size=16",
        "batch_windows=4",
        "windows=8",
        "methods=[llama3,ulysses_best_effort,flashcp,flashcp:d4:h2]",
    ]
    document = simulate(*chosen)
    assert (document["batch_windows"], document["micro_batches"], document["waits"]) == (4, 1, "micro_batch")
    placed = {one["name"]: (one["data_parallel"], one["head_ranks"]) for one in document["methods"]}
    assert placed.pop("flashcp")[0] == 1
    assert placed == {"llama3": (4, 1), "ulysses_best_effort": (4, 4), "flashcp:d4:h2": (4, 2)}


def test_every_model_is_simulated_as_it_is_published(simulate: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Heads divide, mixes fit, and a window makes a layer cheaper than none."""
    names = sorted(path.stem for path in (ROOT / "conf/model").glob("*.yaml"))
    assert {"llama3-8b", "gemma3-27b", "gpt-oss-120b", "qwen3-32b"} <= set(names)
    small = ["windows=1", "context=32768", "world_size=8", "plan_by=rows", "methods=[llama3,flashcp]"]
    for name in names:
        document = simulate(*small, f"model={name}")
        assert document["model"]["name"] == name
        assert all(one["module_ms"] > 0 for one in document["methods"])
    mixed, causal = (
        simulate(*small, "model=gpt-oss-120b", *more)["methods"][0]["attention_ms"]
        for more in ([], ["model.window=0", "model.narrowed_layers=0"])
    )
    assert mixed < 0.7 * causal
    assert main(["simulate", *small, "model=bert-large"]) == 0
    assert "; bert-large, 24 layers of 16 query and 16 KV heads of 64, full attention\n" in capsys.readouterr().out
