"""The page of several labs: what it says where predictions are right, off, or the other way round."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashcp.experiments.cli.main import main
from flashcp.experiments.lab.page import lab_table, lines, out_of_order
from flashcp.experiments.sweep.results import Number, Row, to_row, write_rows

KIND = "emulated: a node's link carries 44 MB/s"


def rows(speedups: dict[str, tuple[float, float, float, float]]) -> list[Row]:
    """Of a lab. speedups: p20, median and p80 of the measured one, and the predicted one."""

    def row(method: str, metric: str, *numbers: float | None) -> Row:
        return to_row("4x2 ib", Number(method, metric, "", *numbers), "CPU", KIND)

    made = [row("lab", "link_gbps", None, 0.044, None)]
    for method, (p20, median, p80, predicted) in speedups.items():
        made += [
            row(method, "module_ms", 1.0, 1000 / median, 2.0),
            row(method, "predicted_ms", None, 800 / predicted, None),
            row(method, "speedup", p20, median, p80),
            row(method, "predicted_speedup", predicted, predicted, predicted),
            row(method, "link_mb", None, 102.0, None),
            row(method, "route_mb", None, 100.0, None),
        ]
    return made


BASE = {"llama3": (1.0, 1.0, 1.0, 1.0)}


def test_only_pairs_that_are_told_apart_can_be_out_of_order() -> None:
    made = lines(rows(BASE | {"ring": (0.5, 0.6, 0.7, 1.2), "flashcp": (1.9, 2.0, 2.1, 1.1)}))
    assert out_of_order(made) == [("llama3", "ring"), ("flashcp", "ring")]
    close = lines(rows(BASE | {"ring": (0.9, 0.95, 1.1, 1.2), "flashcp": (1.05, 1.2, 1.4, 1.1)}))
    assert out_of_order(close) == []


def test_the_page_shows_what_is_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good", tmp_path / "off"
    for folder, speedups in (
        (good, {"flashcp": (1.9, 2.0, 2.1, 2.3)}),
        (bad, {"flashcp": (1.9, 2.0, 2.1, 0.9), "ring": (0.98, 1.0, 1.02, 3.0)}),
    ):
        folder.mkdir()
        write_rows(folder, rows(BASE | speedups))
    assert main(["report", str(tmp_path), f"page={tmp_path / 'page.md'}"]) == 0
    text = (tmp_path / "page.md").read_text()
    assert "| flashcp | 500 | 348 | -30% | 2.00 (1.90 - 2.10) | 2.30 | +15% | 102 | +2.0% |" in text
    assert "| flashcp | 500 | 889 | +78% | 2.00 (1.90 - 2.10) | 0.90 | **-55%** | 102 | +2.0% |" in text
    assert "| ring | 1000 | 267 | -73% | not told apart (0.98 - 1.02) | 3.00 |" in text
    assert text.count("`llama3` itself is predicted -20% off, and with it every speedup") == 1
    assert text.count("the prediction says the opposite") == 2  # flashcp over llama3, flashcp over ring
    assert text.count("The cause is not known.") == 1
    assert "![measured beside predicted speedups](good/lab.png)" in text
    assert (bad / "lab.png").stat().st_size > 10_000
    (bad / "causes.md").write_text("Links are slower there.\n")
    assert main(["report", str(tmp_path), f"page={tmp_path / 'page.md'}"]) == 0
    assert "the rest is the method's own.\n\nLinks are slower there.\n" in (tmp_path / "page.md").read_text()
    capsys.readouterr()
    assert main(["report", str(good), "page=page.md"]) == 2
    assert "page=page.md: expected the directory above" in capsys.readouterr().err
    assert main(["report", str(good)]) == 0
    assert "2.00 (1.90 - 2.10)" in capsys.readouterr().out


@pytest.mark.parametrize("lost", ["link_gbps", "module_ms", "speedup", "route_mb"])
def test_a_lab_that_lacks_rows_is_named_in_one_line(
    lost: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "lab"
    folder.mkdir()
    write_rows(folder, [row for row in rows(BASE) if row.metric != lost])
    for words in ([str(folder)], [str(tmp_path)]):
        assert main(["report", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{folder / 'results.csv'}: not all of a lab's rows: expected {lost} of " in line
    assert [file.name for file in tmp_path.rglob("*.*")] == ["results.csv"]


def test_beside_other_work_nothing_is_told_apart() -> None:
    some = rows(BASE | {"flashcp": (1.9, 2.0, 2.1, 2.3)})
    busy = to_row("4x2 ib", Number("lab", "taken_cores", "cores", None, 0.4, None), "CPU", KIND)
    assert lines(some)[1].text == "2.00 (1.90 - 2.10)"
    assert lines([*some, busy])[1].text == "not told apart (1.90 - 2.10)"
    assert "others kept 0.40 cores busy" in lab_table([*some, busy])
    assert "others kept" not in lab_table(some)
