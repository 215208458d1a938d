"""The picture of a trace: which range is what, where bars lie, and that a profiled run draws it."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.colors import to_hex

from flashcp.experiments.cli.main import main
from flashcp.experiments.cli.timeline import KINDS, Range, kind, timeline_figure


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("send rows to rank 12", "transfer"),
        ("send gradients to rank 0", "transfer"),
        ("gloo:all_to_all", "transfer"),
        ("attention 3, send rows", "packing, adding"),
        ("send gradients of outputs", "packing, adding"),
        ("gradients home", "packing, adding"),
        ("local tiles", "local tiles"),
        ("gradients of local tiles", "local tiles"),
        ("remote tiles (from 1, 2)", "remote tiles"),
        ("gradients of remote tiles", "remote tiles"),
        ("all tiles, waits inside", "local and remote tiles"),
        ("wait for rows of rank 1", "wait"),
        ("headers", "wait"),
        ("attention 3, forward", ""),
        ("ProfilerStep#2", ""),
        ("gloo:all_reduce", ""),
    ],
)
def test_kinds(name: str, wanted: str) -> None:
    assert kind(name) == wanted


def test_bars_lie_where_the_ranges_are() -> None:
    call = [
        ("attention 5, send rows", 100, 101),
        ("attention 5, forward", 103, 120),
        ("attention 5, backward", 200, 210),
    ]
    first = [
        ("local tiles", 104, 110),
        ("send rows to rank 1", 101, 112),
        ("headers", 90, 99),
        ("local tiles", 130, 140),
    ]
    second = [("wait for rows of rank 0", 106, 112), ("remote tiles (from 0)", 112, 118), ("local tiles", 201, 209)]
    ranks = [[Range(*each) for each in (*call, *own)] for own in (first, second)]
    forward, backward = timeline_figure(ranks, 5).axes

    def bars(axes: object) -> set[tuple[str, int, float, float]]:
        colours = {colour: name for name, (_, colour) in KINDS.items()}
        return {
            (
                colours[to_hex(bar.get_facecolor())],
                round(bar.get_y() + bar.get_height() / 2),
                bar.get_x(),
                bar.get_width(),
            )
            for bar in axes.patches  # type: ignore[attr-defined]
        }

    assert bars(forward) == {
        ("packing, adding", 1, 0, 1),
        ("packing, adding", 3, 0, 1),
        ("transfer", 0, 1, 11),
        ("local tiles", 1, 4, 6),
        ("wait", 3, 6, 6),
        ("remote tiles", 3, 12, 6),
    }
    assert bars(backward) == {("local tiles", 3, 1, 8)}
    assert forward.get_xlim() == (0, 20)
    assert [label.get_text() for label in forward.get_yticklabels()] == [
        "rank 0 transfers",
        "rank 0 computes",
        "rank 1 transfers",
        "rank 1 computes",
    ]
    assert {text.get_text() for text in forward.texts} == {"to 1", "from 0"}


def test_a_profiled_run_leaves_traces_and_a_picture(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", *tiny, "profile=true", f"out={out}"]) == 0
    said = capsys.readouterr().err
    assert f"traces of the ranks: {out}/trace " in said
    assert f"timeline: {out}/timeline.png\n" in said
    assert (out / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (out / "trace").iterdir()} == {"rank0.json.gz", "rank1.json.gz"}
