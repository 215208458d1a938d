"""Work of others beside a lab is noticed, its own is not counted."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from flashcp.experiments.lab.machine import Others
from flashcp.train.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


def hash_until(end: float) -> None:
    """Keep a core busy, without the interpreter's lock."""
    while time.monotonic() < end:
        hashlib.sha256(bytes(1 << 20))


def test_work_of_others_is_noticed() -> None:
    code = "import time; end = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    with subprocess.Popen([sys.executable, "-c", code]) as other:
        try:
            time.sleep(0.3)
            others = Others(ALONE)
            time.sleep(1.5)
            assert others.taken(float(os.cpu_count() or 1)) > 0.3
        finally:
            other.kill()


def test_its_own_work_is_not_counted() -> None:
    """All cores are busy with it: what it gets is not there for others."""
    cores = os.cpu_count() or 1
    others, cpu, begun = Others(ALONE), time.process_time(), time.monotonic()
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(hash_until, [begun + 2.0] * cores))
    got = (time.process_time() - cpu) / (time.monotonic() - begun)
    assert got > 0.2
    assert others.taken(float(cores)) < cores - got + 0.15
