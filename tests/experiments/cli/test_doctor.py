"""`flashcp doctor`: alone, on ranks of its own and of a launcher, with --json, and where something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import flashcp
from flashcp.comm.exchanges import EXCHANGE_CLASSES
from flashcp.comm.nvshmem import is_available
from flashcp.experiments.cli import doctor
from flashcp.experiments.cli.main import main


def test_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for expected in (torch.__version__, "/dev/shm", "transport   auto takes none: one rank alone", "ranks=2"):
        assert expected in said
    assert is_available() in (True, False)
    assert [f"self-test   {name}: relative error" in said for name in EXCHANGE_CLASSES] == [True] * 5


def test_ranks_of_its_own_with_json() -> None:
    code = "import sys; from flashcp.experiments.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "doctor", "ranks=2", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["healthy"]
    assert facts["versions"].keys() >= {"python", "torch", "triton", "numpy", "flashcp", "commit"}
    assert len(facts["ranks"]) == 2
    for rank in facts["ranks"]:
        assert rank["self_test"].keys() == EXCHANGE_CLASSES.keys()
        assert all(one["error"] < 1e-5 for one in rank["self_test"].values())
        if not torch.cuda.is_available():
            assert {one["transport"] for one in rank["self_test"].values()} == {"shm"}


def test_as_a_rank_of_a_launcher_without_hydra() -> None:
    code = f"import sys; sys.modules['hydra'] = None; sys.path.insert(0, {os.getcwd()!r}); "
    code += "from flashcp.experiments.cli import doctor; sys.exit(doctor.main([]))"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    done = subprocess.run([sys.executable, *launcher, sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("self-test   exact: relative error") == 1  # rank 0 speaks


def test_what_is_wrong_is_said_and_the_exit_code_is_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(doctor.BOUNDS, torch.float32, 0.0)
    assert main(["doctor"]) == 1
    assert "self-test   ring: FAILED: error " in capsys.readouterr().out
    monkeypatch.setattr(doctor, "TIMEOUT_S", -1.0)
    assert main(["doctor", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert not facts["healthy"]
    assert facts["ranks"][0]["self_test"]["exact"]["failed"].startswith("ValueError: timeout_s=-1.0: expected seconds")


def test_gradients_that_are_no_numbers_fail(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = flashcp.ContextParallel.attention

    def spoilt(cp: flashcp.ContextParallel, q: Tensor, k: Tensor, v: Tensor, plan: flashcp.ShardingPlan) -> Tensor:
        v = v.clone()
        v.register_hook(lambda grad: grad * torch.nan)
        return real(cp, q, k, v, plan)

    monkeypatch.setattr(flashcp.ContextParallel, "attention", spoilt)
    assert main(["doctor"]) == 1
    assert "self-test   exact: FAILED: error inf" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["ranks=0", "ranks=x", "ranks=65", "rank=2", "ranks"])
def test_bad_words_are_one_line(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", word]) == 2
    expected = f"flashcp: error: {word!r}: expected ranks=N, a whole number >= 1 and <= 64\n"
    assert capsys.readouterr().err == expected
