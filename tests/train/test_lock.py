"""A second run that would write into the same folder is refused; the lock of a dead process is no lock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashcp.experiments.cli.compose import compose
from flashcp.experiments.cli.launch import launch
from flashcp.experiments.cli.train import read_run
from flashcp.train.lock import check_free, only_writer
from flashcp.train.ranks import Ranks
from tests.checkout import ROOT
from tests.ranks import RankError, run_ranks
from tests.train.test_run import small, train

HOLD = """
import sys, time, torch
from pathlib import Path
from flashcp.train.lock import only_writer
from flashcp.train.ranks import Ranks
with only_writer(Path(sys.argv[1]), Ranks(0, 1, torch.device("cpu"))):
    print("held", flush=True)
    time.sleep(60)
"""


def holding(out: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = holding(out)
    said = rf"^out='.*run': process {first.pid} on \S+ writes there; wait for its end, or choose another out$"
    try:
        (out / "ranks.log").write_text("the first run's")
        with pytest.raises(ValueError, match=said):
            train(small(out))
        with pytest.raises(RankError, match=said.strip("^$")):  # on every rank
            run_ranks(train, 2, small(out))
        run = read_run(compose("train", ["model.layers=1"])).placed(str(out), "", ())
        with pytest.raises(ValueError, match=said):
            launch(run)
        assert (out / "ranks.log").read_text() == "the first run's"
        assert not (out / "metrics.jsonl").exists()
    finally:
        first.kill()
        first.communicate()
    assert (out / "lock").exists()
    check_free(out)
    assert train(small(out)) is not None
    assert not (out / "lock").exists()


def test_looking_leaves_nothing(tmp_path: Path) -> None:
    check_free(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_one_folder_by_two_names_is_one_folder(tmp_path: Path) -> None:
    alone = Ranks(0, 1, torch.device("cpu"))
    (tmp_path / "link").symlink_to(tmp_path)
    with (
        only_writer(tmp_path, alone),
        pytest.raises(ValueError, match="writes there"),
        only_writer(tmp_path / "link", alone),
    ):
        pass
