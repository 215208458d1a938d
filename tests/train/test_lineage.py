"""Going back to an earlier checkpoint loses nothing: each lineage keeps its own, and `latest` follows the last."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from flashcp.train.lineage import Lineage, find_latest
from tests.train.test_run import read_rows, small, train

SHORT = {"accumulation": 1}


def checkpoints(out: Path) -> dict[str, list[bytes]]:
    """Every checkpoint's name, and all that it holds."""
    return {
        folder.name: [file.read_bytes() for file in sorted(folder.iterdir())]
        for folder in sorted(out.glob("checkpoints/*step_*"))
    }


@pytest.fixture(scope="module")
def twenty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("twenty") / "run"
    train(small(out, loop={**SHORT, "steps": 20}, checkpoint={"every": 5, "keep": 10}))
    return out


def go_back(out: Path, steps: int, every: int, at: str = "step_00000010", keep: int = 10) -> None:
    resume = at if at == "latest" else str(out / "checkpoints" / at)
    train(small(out, loop={**SHORT, "steps": steps}, checkpoint={"every": every, "keep": keep, "resume": resume}))


def test_going_back_keeps_all_and_latest_goes_on_from_there(twenty: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(twenty, tmp_path / "run"))
    before, rows = checkpoints(out), read_rows(out)
    go_back(out, steps=13, every=3, keep=1)
    after = checkpoints(out)
    assert after.keys() == {*before, "step_00000012"}
    assert {name: after[name] for name in before} == before
    go_back(out, steps=15, every=3, at="latest", keep=1)
    assert [row["step"] for row in read_rows(out)] == list(range(1, 16))  # 13 follows 12, not 21
    # of its own it keeps the last and the one it came from; 10 is the first run's
    assert checkpoints(out).keys() == {*before, "step_00000012", "step_00000015_2"}
    (left,) = out.glob("metrics_*.jsonl")
    assert [json.loads(line) for line in left.read_text().splitlines()] == rows


def test_going_back_at_the_same_pace_overwrites_nothing(twenty: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(twenty, tmp_path / "run"))
    before = checkpoints(out)
    go_back(out, steps=15, every=5)
    after = checkpoints(out)
    assert after.keys() == {*before, "step_00000015_2"}
    assert {name: after[name] for name in before} == before
    assert find_latest(out) == out / "checkpoints" / "step_00000015_2"
    # back to the first lineage, whose rows come back with it
    go_back(out, steps=21, every=1, at="step_00000020")
    assert [row["step"] for row in read_rows(out)] == list(range(1, 22))
    assert without_times(out)[:20] == without_times(twenty)


def without_times(out: Path) -> list[float]:
    return [row["loss"] for row in read_rows(out)]


def test_a_run_that_dies_before_its_first_checkpoint_is_the_latest(twenty: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(twenty, tmp_path / "run"))
    go_back(out, steps=12, every=5)  # ends before step 15
    assert find_latest(out) == out / "checkpoints" / "step_00000010"
    go_back(out, steps=13, every=5, at="latest")
    assert [row["step"] for row in read_rows(out)] == list(range(1, 14))
    new = tmp_path / "new"  # the same in a folder of its own
    source = str(twenty / "checkpoints" / "step_00000010")
    train(small(new, loop={**SHORT, "steps": 12}, checkpoint={"resume": source}))
    go_back(new, steps=13, every=5, at="latest")
    assert [row["step"] for row in read_rows(new)] == [11, 12, 13]


def test_keep_counts_a_lineage_alone_and_spares_its_source(twenty: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(twenty, tmp_path / "run"))
    go_back(out, steps=24, every=1, at="latest", keep=2)  # the same lineage: 5, 10 and 15 are its own and old
    assert list(checkpoints(out)) == ["step_00000020", "step_00000023", "step_00000024"]


def test_a_latest_that_cannot_be_told_is_refused(twenty: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(twenty, tmp_path / "run"))
    latest = out / "latest.json"
    shutil.rmtree(out / "checkpoints" / "step_00000020")
    with pytest.raises(ValueError, match=r"latest\.json names .*step_00000020', where none is; .*step_00000015$"):
        find_latest(out)
    latest.write_text('{"checkpoint": "checkpoints/step_00000015", "lineage": "../../x"}')
    with pytest.raises(ValueError, match=r"latest\.json: cannot be read \('../../x' names no lineage\)"):
        find_latest(out)
    latest.unlink()
    with pytest.raises(ValueError, match=r"latest\.json is gone; checkpoint\.resume= takes a path: .*step_00000015$"):
        find_latest(out)


def test_what_is_half_removed_is_no_checkpoint(twenty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Path(shutil.copytree(twenty, tmp_path / "run"))
    lineage = Lineage(out, out / "checkpoints" / "step_00000020")
    lineage.begin()
    unfinished = out / "checkpoints" / "unfinished_step_00000021"
    shutil.copytree(out / "checkpoints" / "step_00000020", unfinished)

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        lineage.publish(unfinished, lineage.place(21), keep=1)
    assert sorted(path.parent.name for path in out.glob("checkpoints/step_*/identity.json")) == [
        "step_00000020",
        "step_00000021",
    ]
