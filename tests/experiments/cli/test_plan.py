"""`flashcp plan`: packs from any data set, the fields of its JSON, what a single method adds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

import flashcp
from flashcp.experiments.cli import picture
from flashcp.experiments.cli.main import main
from flashcp.experiments.cli.packs import read_packs
from flashcp.sharding.lengths import windows
from flashcp.sharding.methods import METHODS


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*overrides: str) -> dict[str, Any]:
        assert main(["plan", *overrides, "--json"]) == 0
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return document

    return run


def test_every_method_by_default(plan: Any) -> None:
    methods = plan("windows=3", "context=8192", "world_size=4")["methods"]
    assert [(method["name"], method["sharding"], method["exchange"]) for method in methods] == list(METHODS.values())
    by_name = {method["name"]: method for method in methods}
    assert by_name["llama3"]["saving"] == 0
    assert by_name["llama3"]["critical_rows"] == 8192 * 3 / 4
    assert by_name["ulysses"]["imbalance"] == by_name["ulysses"]["imbalance_max"] == 1
    assert all(1 <= method["imbalance"] <= method["imbalance_max"] for method in methods)


def test_numbers_are_means_over_windows_of_the_plans(plan: Any) -> None:
    (method,) = plan("method=flashcp_paper", "windows=5", "context=16384", "world_size=3", "seed=7", "data=pile")[
        "methods"
    ]
    plans = [flashcp.plan(lengths, 3, "flashcp_paper") for lengths in windows("pile", 16384, 5, 7)]
    routes = [made.route("compacted") for made in plans]
    assert method["imbalance"] == pytest.approx(np.mean([made.imbalance for made in plans]))
    assert method["imbalance_max"] == max(made.imbalance for made in plans)
    assert method["critical_rows"] == pytest.approx(np.mean([route.critical_rows for route in routes]))
    assert method["saving"] == pytest.approx(np.mean([route.saving for route in routes]))


def test_a_batch_is_one_pack_for_holders(plan: Any, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["windows=5", "context=16384", "batch_windows=2", "world_size=8", "seed=7", "data=pile"]
    document = plan(*overrides, "method=flashcp", "head_ranks=2")
    packs = list(windows("pile", 16384, 5, 7))
    plans = [flashcp.plan(np.concatenate(packs[i : i + 2]), 4) for i in (0, 2)]
    (method,) = document["methods"]
    assert {key: document[key] for key in ("windows", "batch_windows", "head_ranks", "holders")} == {
        "windows": 4,
        "batch_windows": 2,
        "head_ranks": 2,
        "holders": 4,
    }
    assert flashcp.ShardingPlan.from_json(json.dumps(document["plan"])) == plans[0]
    assert method["imbalance_max"] == max(made.imbalance for made in plans)
    # Half of the heads of what the holder exchanges; of Q, K, V, O half of the heads of half of its rows go and come.
    rows = [made.route("exact").critical_rows / 2 + 8192 / 2 for made in plans]
    assert method["critical_rows"] == pytest.approx(np.mean(rows))
    assert method["saving"] == pytest.approx(1 - np.mean(rows) / (4096 * 7))
    (alone,) = plan(*overrides, "method=flashcp")["methods"]
    plans = [flashcp.plan(np.concatenate(packs[i : i + 2]), 8) for i in (0, 2)]
    assert alone["critical_rows"] == np.mean([made.route("exact").critical_rows for made in plans])
    main(["plan", *overrides, "method=flashcp", "head_ranks=2"])
    shown = capsys.readouterr().out
    assert shown.startswith("4 windows in batches of 2 of 16384 tokens from pile, ")
    assert "8 ranks, 4 holders of 2\n" in shown
    assert "first batch\nShardingPlan(flashcp: " in shown


def test_rows_of_a_rank_are_the_simulator_s(plan: Any) -> None:
    same = ["windows=4", "context=16384", "batch_windows=2", "world_size=8", "data=pile", "method=flashcp"]
    (planned,) = plan(*same, "head_ranks=4")["methods"]
    simulated = flashcp.simulate(
        [pack.tolist() for pack in windows("pile", 16384, 4, 0)],
        8,
        batch_windows=2,
        methods="flashcp:h4",
        plan_by="rows",
    )["flashcp:h4"]
    assert planned["critical_rows"] == pytest.approx(simulated.critical_rows)
    assert planned["saving"] == pytest.approx(simulated.saving)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["head_ranks=3"], "head_ranks=3: expected a divisor of world_size=8"),
        (["head_ranks=auto"], "head_ranks='auto': expected a whole number"),
        (["head_ranks=0"], "head_ranks=0: expected a whole number >= 1"),
        (["batch_windows=3", "windows=2"], "batch_windows=3: expected at most the 2 windows of windows= and the data"),
    ],
)
def test_what_makes_no_batch(overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "context=1024", *overrides]) == 2
    assert capsys.readouterr().err == f"flashcp: error: {message}\n"


def test_one_method_comes_with_its_first_plan(plan: Any, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["method=per_document", "data=lengths", "data.lengths=[700,400,211]", "world_size=4"]
    made = flashcp.ShardingPlan.from_json(json.dumps(plan(*overrides)["plan"]))
    assert made == flashcp.plan([700, 400, 211], 4, "per_document")
    main(["plan", *overrides])
    shown = capsys.readouterr().out
    assert str(made) in shown
    assert str(made.certificate) in shown


def test_a_pair_that_nobody_published_is_named_after_its_parts(plan: Any) -> None:
    for overrides, name in (
        (["sharding=contiguous"], "contiguous+exact"),
        (["exchange=ring", "sharding=contiguous"], "ring"),
        (["method=llama3", "exchange=exact"], "per_sequence+exact"),
    ):
        assert [method["name"] for method in plan("windows=1", *overrides)["methods"]] == [name]


def test_picture(tmp_path: Path) -> None:
    assert main(["plan", "method=flashcp_paper", "windows=1", "world_size=17", f"figure={tmp_path / 'plan.png'}"]) == 0
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_method_the_picture_shows_all_side_by_side(tmp_path: Path) -> None:
    assert main(["plan", "windows=1", "context=1024", "world_size=3", f"figure={tmp_path / 'all.png'}"]) == 0
    all_of_them, one = read_png(tmp_path / "all.png"), tmp_path / "one.png"
    assert main(["plan", "windows=1", "context=1024", "world_size=3", "method=flashcp", f"figure={one}"]) == 0
    assert all_of_them[0] > read_png(one)[0]  # two lines of four


def test_the_picture_of_a_batch_names_holders_and_marks_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(picture, "save", lambda figure, path: (drawn.append(figure), path)[1])
    words = ["windows=3", "context=1000", "batch_windows=3", "world_size=4", "head_ranks=2", "figure=x.png"]
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "method=flashcp", *words]) == main(["plan", *words]) == 0
    for figure, titles in zip(drawn, (4, 2 * len(METHODS)), strict=True):
        assert len(figure.axes) == titles
        pairs = figure.axes[0]
        ends = [line.get_ydata()[0] for line in pairs.lines]
        assert ends == [1000, 2000]
        assert [text.get_text() for text in pairs.get_legend().get_texts()] == ["holder 0", "holder 1"]
        assert all(axes.get_xlabel() in ("holder of 2", pairs.get_xlabel()) for axes in figure.axes if axes.patches)
    assert "saving" in drawn[0].get_suptitle()
    assert "4 ranks" in drawn[0].get_suptitle()


def read_png(path: Path) -> tuple[int, int]:
    """Height and width."""
    head = path.read_bytes()[16:24]
    return int.from_bytes(head[4:], "big"), int.from_bytes(head[:4], "big")


def test_picture_says_the_file_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "method=llama3", "windows=1", "context=1024", f"figure={tmp_path / 'plan'}"]) == 0
    assert f"wrote {tmp_path / 'plan.png'}" in capsys.readouterr().err
    assert (tmp_path / "plan.png").is_file()


def test_lengths_of_a_file_are_packed_in_its_order(tmp_path: Path) -> None:
    file = tmp_path / "lengths.txt"
    file.write_text("\ufeff5\n\n 7 \n3\n", encoding="utf-8")  # a mark that some editors put first is no length
    data = {"source": "lengths", "path": str(file)}
    assert [pack.tolist() for pack in read_packs(data, 8, 10, 0)] == [[5, 3], [3]]
    assert [pack.tolist() for pack in read_packs({**data, "overflow": "carry"}, 8, 10, 0)] == [[5, 3], [4, 3]]
    assert [pack.tolist() for pack in read_packs(data, 8, 1, 0)] == [[5, 3]]


def test_text_is_packed_as_training_packs_it(tmp_path: Path) -> None:
    for name, text in (("a.txt", "four"), ("b.txt", "sixsix"), ("c.txt", "")):
        (tmp_path / name).write_text(text)
    data = {"source": "text", "path": str(tmp_path)}
    assert [pack.tolist() for pack in read_packs(data, 8, 10, 0)] == [[5, 3]]  # a byte a token and an end mark
    assert [pack.tolist() for pack in read_packs({**data, "longest": 5}, 8, 10, 0)] == [[5]]
    with pytest.raises(ValueError, match="no document to pack"):
        read_packs({**data, "longest": 2}, 8, 10, 0)


def test_short_last_window_is_left_out_when_ranks_outnumber_its_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "data=lengths", "data.lengths=[8,2]", "context=8", "world_size=4", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["windows"] == 1
    assert err == "left out: a last window of 2 tokens, fewer than 4 ranks\n"


def test_a_model_is_planned_for_by_its_mix(plan: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Means over the layers, of the sum of their work; narrowed layers read less."""
    overrides = ["windows=2", "context=16384", "world_size=4", "method=per_document"]
    (causal,), (mixed,) = (plan(*overrides, *more)["methods"] for more in ([], ["model=gemma3-27b"]))
    packs = read_packs({"source": "wlb_llm"}, 16384, 2, 0)
    layers = [(flashcp.Mask(), 10), (flashcp.Mask("window", 1024), 52)]
    made = [flashcp.plan(pack, 4, "per_document", layers=layers) for pack in packs]
    assert mixed["imbalance"] == pytest.approx(np.mean([one.imbalance for one in made]))
    assert mixed["critical_rows"] == causal["critical_rows"]  # every row goes to everybody
    exact = plan(*overrides, "exchange=exact", "model=gemma3-27b")["methods"][0]
    rows = [[one.route("exact", window=w).critical_rows for w in (None, 1024)] for one in made]
    assert exact["critical_rows"] == pytest.approx(np.mean([(10 * a + 52 * b) / 62 for a, b in rows]))
    assert main(["plan", *overrides, "model=gemma3-27b"]) == 0
    head = "gemma3-27b, 62 layers of 32 query and 16 KV heads of 128, 52 of them with 1024 keys back"
    assert f"; {head}: rows are means over its layers" in capsys.readouterr().out


def test_a_picture_of_a_mix_shows_what_every_kind_of_layer_sees(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[np.ndarray] = []
    monkeypatch.setattr(
        picture, "_corners", lambda one, corners=picture._corners: drawn.extend(corners(one)) or corners(one)
    )
    layers = [(flashcp.Mask(), 1), (flashcp.Mask("chunk", 40), 1)]
    made = flashcp.plan([100, 28], 2, "contiguous", layers=layers)
    picture.draw_plan(made, "exact", tmp_path / "mix.png")
    areas = [
        0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) for x, y in (c.astype(float).T for c in drawn)
    ]
    causal, chunks = sum(areas[: len(made.table.rank)]), sum(areas[len(made.table.rank) :])
    assert causal == (100**2 + 28**2) / 2  # trapezoids go through the middle of rows
    assert chunks == made.narrow(chunk=40).work.sum()


def test_pictures_of_a_mix_say_what_the_table_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    saved: list[Figure] = []
    monkeypatch.setattr(picture, "save", lambda figure, path: (saved.append(figure), path)[1])
    made = flashcp.plan([100, 28], 2, "contiguous", layers=[(flashcp.Mask(), 1), (flashcp.Mask("window", 10), 3)])
    routes = [made.route("exact"), made.route("exact", window=10)]
    mean = (routes[0].received_rows + 3 * routes[1].received_rows) / 4
    picture.draw_plan(made, "exact", tmp_path / "one.png")
    picture.draw_methods({"flashcp": (made, "exact")}, tmp_path / "all.png")
    saving = (routes[0].saving + 3 * routes[1].saving) / 4
    assert f"imbalance {made.imbalance:.3f}, saving {saving:.3f}" in saved[0].get_suptitle()
    above, below = saved[1].axes
    assert made.imbalance != routes[0].imbalance
    assert above.get_title("left") == f"flashcp: busiest rank {made.imbalance:.2f} x the mean"
    assert "pale: some layers" in above.get_xlabel()
    assert [bar.get_height() for bar in below.patches] == mean.tolist()
    assert below.get_title("left") == f"KV rows received, layers' mean: {mean.sum():,.0f}"


def test_a_mix_is_uneven_where_its_causal_layers_alone_are_even() -> None:
    made = flashcp.plan([100, 28], 2, "per_document", layers=[(flashcp.Mask(), 1), (flashcp.Mask("window", 10), 3)])
    assert made.route("exact").imbalance == 1.0
    assert made.over_layers("exact")[0] == made.imbalance > 1.02
    assert made.over_layers("ulysses")[0] == 1.0


def test_models_that_no_layer_fits_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model=gemma3-27b", "model.chunk=5"]) == 2
    assert capsys.readouterr().err == (
        "flashcp: error: model.narrowed_layers=52 with window=1024, chunk=5: expected one of the two, or none\n"
    )


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ("30", "1 window of 30 tokens from lengths"),
        ("100", "1 window of 100 tokens"),
        ("100,100", "2 windows of 100 tokens"),
        ("100,100,30", "3 windows of 30 to 100 tokens"),
    ],
)
def test_windows_are_told_with_the_tokens_that_they_have(
    lengths: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "data=lengths", f"data.lengths=[{lengths}]", "context=100", "world_size=2"]) == 0
    assert capsys.readouterr().out.startswith(said)
