"""Ranks that are stopped are named soon; nobody trains on when a launcher was killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from flashcp.experiments.cli.launch import diagnose
from tests.checkout import ROOT
from tests.processes import SOON_S, flashcp_train, torchrun, under_way, wait
from tests.train.test_main import write
from tests.train.test_run import small

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds ranks through /proc")

WAITING = """
import os, signal, time
from flashcp.train.ranks import world
with world("cpu", 600.0, 5.0) as ranks:
    ranks.barrier()
    ranks.heartbeat.doing = "in step 3"
    if ranks.rank == 1:
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGSTOP)
    ranks.barrier()
"""
RESTING = """
import time
from flashcp.train.ranks import world
with world("cpu", 600.0, 5.0) as ranks:
    ranks.barrier()
    print(f"rank {ranks.rank} began", flush=True)
    for _ in range(30):
        time.sleep(0.1)
        ranks.barrier()
"""


def endless(tmp_path: Path, **sections: Any) -> dict[str, Any]:
    return small(tmp_path / "run", loop={"steps": 10**6, "accumulation": 1}, parallel={"timeout_s": 5.0}, **sections)


def test_a_stopped_rank_is_named_and_all_end(tmp_path: Path) -> None:
    """By the exchange or by heartbeats, whichever is first: both wait for as long."""
    with under_way([*torchrun(), write(tmp_path, endless(tmp_path))], tmp_path) as job:
        os.kill(job.ranks()[1], signal.SIGSTOP)
        job.gone(5.0 + SOON_S)
    by_heartbeat = r"of 2: rank 1 has been silent for 5 s, last heard of (in step \d+(, [a-z ]+)?|at the start): "
    by_exchange = r"of 2: step \d+, (for|back)ward: \w+: rank 0 waited 5 s: rank 1 did not come"
    named = f"rank 0 ({by_heartbeat}|{by_exchange})"
    assert re.search(f"^error: .*{named}", job.log.read_text(), re.M)
    assert re.search(named, diagnose(job.log, 1).error)


def test_a_rank_that_torch_waits_for_is_named_and_killed(tmp_path: Path) -> None:
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*torchrun()[:-2], str(script)]
    started = time.monotonic()
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    assert (
        "error: rank 0 of 2: rank 1 has been silent for 5 s, last heard of in step 3: it was stopped, or" in ran.stderr
    )
    assert time.monotonic() < started + 30  # and not half a minute more, which torchrun gives ranks to end


def test_a_job_that_is_stopped_as_a_whole_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "resting.py"
    script.write_text(RESTING)
    with under_way([*torchrun()[:-2], str(script)], tmp_path, steps=0) as job:
        wait(lambda: "rank 1 began" in job.log.read_text() and "rank 0 began" in job.log.read_text(), 60.0)
        for process in job.ranks().values():
            os.kill(process, signal.SIGSTOP)
        time.sleep(7.0)
        for process in job.ranks().values():
            os.kill(process, signal.SIGCONT)
        job.gone(30.0)
        assert job.launcher.returncode == 0, job.log.read_text()


@pytest.mark.parametrize("killed", ["torchrun", "flashcp"])
def test_nobody_trains_on_without_a_launcher(killed: str, tmp_path: Path) -> None:
    command = [*torchrun(), write(tmp_path, endless(tmp_path))]
    if killed == "flashcp":
        command = flashcp_train("loop.steps=1000000", f"out={tmp_path / 'run'}")
    with under_way(command, tmp_path) as job:
        assert len(job.ranks()) == 2
        job.launcher.kill()
        job.gone()
